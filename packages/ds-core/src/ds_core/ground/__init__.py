"""The ground everything stands on: device, mesh, tickets, collectives, codecs."""
