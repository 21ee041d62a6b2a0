# Snakemake looks here first; the workflow is in workflow/.
include: "workflow/Snakefile"
