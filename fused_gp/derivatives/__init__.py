"""Second derivatives that torch lacks or takes slowly. There are none yet."""
