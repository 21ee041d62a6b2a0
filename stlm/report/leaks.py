from stlm.report.contamination import leaks_table as leaks_table  # moved there
