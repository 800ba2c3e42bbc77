_base_ = "calibrate_digit_scenes.py"
