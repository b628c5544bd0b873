// The LSTM's CUDA binding on CPU tensors: its loop over the steps, lstm_cuda.cpp, launches the emulated kernels.
// lstm_worker.py loads it; it is no part of the module of module.cpp.
#include "../../csrc/bindings/lstm.cpp"
#include "../../csrc/bindings/lstm_cuda.cpp"

// What a torch without CUDA lacks, or refuses.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
