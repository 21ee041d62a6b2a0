"""`stlm new`: from a folder of text to a corpus and a study that fit it, each choice explained."""
