"""x"""

MEMBERS: dict = {}
