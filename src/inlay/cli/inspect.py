def command() -> None:
    """placeholder"""
