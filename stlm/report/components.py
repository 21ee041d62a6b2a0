from stlm.report.bits_table import component_table as component_table  # moved there
