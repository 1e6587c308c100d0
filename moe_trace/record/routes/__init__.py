"""Routes while a model runs: ids cast on the device, joined into rows on the host, within a bound."""
