"""Most of a test's time is the compiler's; with these flags it does less."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
