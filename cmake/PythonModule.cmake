# `_C` (pybind11): bound to the Python it is built with, and therefore optional in every way.
file(GLOB python_sources CONFIGURE_DEPENDS csrc/python/*.cpp)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c "import pybind11; print(pybind11.get_include())"
  OUTPUT_VARIABLE pybind11_include
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)
if(NOT pybind11_include OR NOT Python3_Development.Module_FOUND)
  message(STATUS "_C: off (it needs pybind11 and the headers of Python)")
  return()
endif()

execute_process(
  COMMAND git describe --always --dirty --abbrev=12 --exclude *
  WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
  OUTPUT_VARIABLE ADVDL_COMMIT
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)
list(JOIN ADVDL_HOST_FLAGS " " host_flags)
string(TOUPPER ${CMAKE_BUILD_TYPE} build_type)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}} ${host_flags}" ADVDL_FLAGS_TEXT)
list(JOIN ADVDL_CPU_CAPABILITIES " " ADVDL_CPU_CAPABILITIES_TEXT)
configure_file(cmake/build_info.h.in generated/build_info.h @ONLY)

Python3_add_library(_C MODULE WITH_SOABI ${python_sources})
target_compile_options(_C PRIVATE ${ADVDL_HOST_FLAGS})
# pybind11's templates, of which no test measures a time; the probes are optimized.
set_source_files_properties(
  csrc/python/cpu_kernels.cpp csrc/python/module.cpp PROPERTIES COMPILE_OPTIONS -O1)
target_include_directories(_C PRIVATE csrc/common csrc/cpu ${CMAKE_CURRENT_BINARY_DIR}/generated)
target_include_directories(_C SYSTEM PRIVATE ${pybind11_include})
target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)
find_package(Threads REQUIRED)
target_link_libraries(_C PRIVATE Threads::Threads)
target_link_libraries(_C PRIVATE advdl_cpu_kernels)
install(TARGETS _C LIBRARY DESTINATION . COMPONENT cpu)
