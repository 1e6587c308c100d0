"""Recording of routes: ids are cast on the device and joined into rows on the host, in bounded memory."""
