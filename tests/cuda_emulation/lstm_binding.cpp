// The CUDA half of csrc/bindings/lstm.cpp on CPU tensors, so that its loop over the steps, lstm_steps.h, launches the
// emulated kernels. lstm_worker.py loads it; not part of the module of module.cpp.
#include "../../csrc/bindings/lstm.cpp"

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
