"""placeholder until the layout's test is written"""
