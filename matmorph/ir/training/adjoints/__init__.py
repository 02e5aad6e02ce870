"""Reverse-mode differentiation of a Graph: `tape` walks it, the other files hold one family of operators each."""
