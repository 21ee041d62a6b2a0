from stlm.report.notes import noise_note as noise_note  # moved there
