"""Every decoder against inputs that nobody honest would send.

``decoders.py`` is the table of them, ``mutations.py`` makes inputs, ``test_decoders.py`` tries ten
thousand of each in every run of the suite, and ``make fuzz`` a million and more with atheris.
"""
