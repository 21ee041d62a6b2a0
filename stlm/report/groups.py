from stlm.report.statistics import group_records as group_records  # moved there
