def serve() -> None:
    pass
