"""How a file or a folder comes to be on a disk that other processes use too: whole or not at all, under a name that nothing else has.

Errors are those of the system; whoever writes says what they mean.
"""
