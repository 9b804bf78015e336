"""Queue -> fit -> publish: learns prefixes on a frozen model, in a process of its own."""
