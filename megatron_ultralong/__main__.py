"""`python -m megatron_ultralong NAME ...` is `ultralong NAME ...`."""

from megatron_ultralong.commands.main import main

if __name__ == "__main__":
    main()
