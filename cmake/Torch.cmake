# Where the running Python has its torch. find_package(Torch) is not used: it asks for the CUDA
# toolkit that torch was built with, which a CPU-only machine does not have.
find_package(Python3 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)

# torch itself is not imported: that takes seconds, and version.py tells all that is needed.
execute_process(
  COMMAND
    ${Python3_EXECUTABLE} -c
    "import importlib.util, runpy, sys
spec = importlib.util.find_spec('torch')
if spec is None: sys.exit(1)
root = spec.submodule_search_locations[0]
print(root, runpy.run_path(root + '/version.py')['__version__'], sep=';')"
  OUTPUT_VARIABLE torch
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
  RESULT_VARIABLE failed)
if(failed)
  message(
    FATAL_ERROR
      "advdl_ops: ${Python3_EXECUTABLE} has no torch, whose headers the build needs. Install torch "
      "first, then run: pip install --no-build-isolation .")
endif()
list(GET torch 0 TORCH_ROOT)
list(GET torch 1 ADVDL_TORCH_VERSION)
if(ADVDL_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "advdl_ops: torch (${ADVDL_TORCH_VERSION}) must be 2.11 or later")
endif()
set(TORCH_INCLUDE_DIRS ${TORCH_ROOT}/include)
set(TORCH_LIBRARIES ${TORCH_ROOT}/lib/libtorch.so ${TORCH_ROOT}/lib/libtorch_cpu.so)
message(STATUS "torch ${ADVDL_TORCH_VERSION} of ${Python3_EXECUTABLE}")
