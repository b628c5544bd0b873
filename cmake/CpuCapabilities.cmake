# Each csrc/cpu/<family>.cpp is compiled once per capability; csrc/cpu/dispatch.cpp picks one at load.
set(ADVDL_CPU_CAPABILITIES default)
set(ADVDL_CPU_FLAGS_default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND ADVDL_CPU_CAPABILITIES avx2 avx512)
  set(ADVDL_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(ADVDL_CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c)
endif()
