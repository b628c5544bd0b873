# Each csrc/cpu/*.cpp but dispatch.cpp is compiled once per capability; dispatch.cpp picks one at load.
set(ADVDL_CPU_CAPABILITIES default)
set(ADVDL_CPU_FLAGS_default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND ADVDL_CPU_CAPABILITIES avx2 avx512)
  # For CPUs from before 2013, which no benchmark knows: more optimization would take most of the time of this build. Without it
  # gcc does not see that vectors which are filled lane by lane are initialized.
  set(ADVDL_CPU_FLAGS_default -O1 -Wno-maybe-uninitialized)
  set(ADVDL_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(ADVDL_CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c)
endif()
