# Sets ADVDL_CUDA and enables the CUDA language: whenever nvcc is found, whether or not there is a GPU.
set(ADVDL_CUDA OFF)
if(ADVDL_OPS_CUDA MATCHES "^(0|OFF)$")
  message(STATUS "CUDA library: off (ADVDL_OPS_CUDA=0)")
  return()
endif()

find_program(
  ADVDL_NVCC nvcc
  HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda
  PATH_SUFFIXES bin)
if(NOT ADVDL_NVCC)
  if(ADVDL_OPS_CUDA)
    message(FATAL_ERROR "advdl_ops: ADVDL_OPS_CUDA=1, but nvcc was not found (set CUDA_HOME)")
  endif()
  message(STATUS "CUDA library: off (nvcc was not found)")
  return()
endif()

# TORCH_CUDA_ARCH_LIST as torch reads it ("8.0 9.0a;10.0+PTX"), or 8.0, 9.0, 10.0 and PTX of the
# last one: of these, what this nvcc can compile for.
set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
if(arch_list STREQUAL "")
  execute_process(COMMAND ${ADVDL_NVCC} --list-gpu-arch OUTPUT_VARIABLE known)
  foreach(arch IN ITEMS 8.0 9.0 10.0)
    string(REPLACE "." "" number ${arch})
    if(known MATCHES "compute_${number}[^0-9]")
      list(APPEND arch_list ${arch})
    endif()
  endforeach()
  list(JOIN arch_list ";" arch_list)
  string(APPEND arch_list "+PTX")
endif()
string(REGEX REPLACE "[ ,;]+" ";" arch_list "${arch_list}")
list(JOIN arch_list " " ADVDL_CUDA_ARCHITECTURES_TEXT)

# The kernels use nothing that only a newer GPU has. So they become PTX once, for the oldest GPU of the list, and machine code
# for each: a compilation for each would take half as long again. An architecture with a letter (9.0a) needs PTX of its own.
set(gencode)
set(codes)
set(oldest)
foreach(arch IN LISTS arch_list)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+)([a-z]?)(\\+PTX)?$")
    message(FATAL_ERROR "advdl_ops: TORCH_CUDA_ARCH_LIST (${arch}) must list values such as 9.0 or 10.0+PTX")
  endif()
  set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  if(CMAKE_MATCH_3)
    list(APPEND gencode -gencode=arch=compute_${number}${CMAKE_MATCH_3},code=sm_${number}${CMAKE_MATCH_3})
    continue()
  endif()
  if(NOT oldest OR number LESS oldest)
    set(oldest ${number})
  endif()
  list(APPEND codes sm_${number})
endforeach()
if(codes)
  if(arch_list MATCHES "\\+PTX")
    list(APPEND codes compute_${oldest})
  endif()
  list(JOIN codes "," codes)
  list(APPEND gencode -gencode=arch=compute_${oldest},code=[${codes}])
endif()

set(CMAKE_CUDA_COMPILER ${ADVDL_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # by the flags above
enable_language(CUDA)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(ADVDL_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
# Keeps what ptxas says (registers, spills) beside each object; tests/package/test_packaging.py reads it.
set(ADVDL_PTXAS_REPORT ${CMAKE_CURRENT_LIST_DIR}/ptxas_report.sh)
# Kernels of many types and layouts are alike: compressed for size they take a ninth. (nvcc 13 needs a
# driver that can read it anyway.)
set(ADVDL_CUDA_FLAGS ${ADVDL_STANDARD} ${gencode} -Xptxas=-v -Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas
    -Xcompiler=-O1)  # of the host code, which only launches
if(ADVDL_CUDA_VERSION VERSION_GREATER_EQUAL 13.0)
  list(APPEND ADVDL_CUDA_FLAGS --compress-mode=size)
endif()
set(ADVDL_CUDA ON)
message(STATUS "CUDA library: nvcc ${ADVDL_CUDA_VERSION} for ${ADVDL_CUDA_ARCHITECTURES_TEXT}")
