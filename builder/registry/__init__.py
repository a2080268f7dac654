"""Cache images in a registry: references, the registry's API, layers, signatures.

What a registry serves is believed only as far as a digest proves it. Raises RegistryLostError and RegistryRefusedError
for whatever a registry does. Knows no task and no engine.
"""
