"""The embedded defaults (model, reward, judge, prompts) and the code that made them."""
