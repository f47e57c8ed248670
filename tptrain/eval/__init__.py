"""Does the tuned model answer better than the one it started from?"""
