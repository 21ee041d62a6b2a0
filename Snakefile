# Snakemake looks here first; the workflow is in workflow/.
include: "workflow/Snakefile"


# An include does not bring the default target along: this is what `snakemake` alone makes.
workflow.default_target = "all"
