"""Every test runs on eight fake CPU devices, so that what is sharded can be tried; set JAX_PLATFORMS for another platform."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
