"""`coe outcomes`: asks experts prompts with known answers, scores what they say, keeps the rows."""
