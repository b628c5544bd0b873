// torch.ops.advdl_ops.batch_norm_act and its backward: argument checks, allocation, registration.
#include "../common/batch_norm_act.h"

#include <cmath>
#include <tuple>

#include "tensor.h"

namespace advdl_ops {
namespace {

constexpr const char* kName = "batch_norm_act";

BatchNormActShape shape_of(const Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running) {
  BatchNormActShape shape;
  const auto sizes = x.sizes();
  shape.n = sizes[0];
  shape.c = sizes[1];
  shape.s = 1;
  for (int64_t i = 2; i < x.dim(); ++i) shape.s *= sizes[i];
  // With one position, or one channel, both are true; rows of channels are the longer runs.
  shape.layout = is_channels_last(x) && (shape.c > 1 || !x.is_contiguous())
                     ? Layout::channels_last
                     : Layout::channels_first;
  shape.dtype = dtype_of(x, kName);
  const OptionalTensor& affine = weight.has_value() ? weight : bias;
  if (affine.has_value()) shape.weight_dtype = dtype_of(*affine, kName);
  if (running.has_value()) shape.running_dtype = dtype_of(*running, kName);
  return shape;
}

void check_channels(const OptionalTensor& t, const Tensor& x, const char* message) {
  check(!t.has_value() || (t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device()),
        message);
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

bool same_kind(const Tensor& a, const Tensor& b) {
  return same_sizes(a, b) && a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

void check_common(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  int64_t act) {
  check(x.dim() >= 2, "batch_norm_act: x must have at least 2 dimensions");
  check_channels(weight, x,
                 "batch_norm_act: weight must have one value per channel of x, on its device");
  check_channels(bias, x,
                 "batch_norm_act: bias must have one value per channel of x, on its device");
  check(!weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
        "batch_norm_act: weight and bias must have the same dtype");
  check(act >= 0 && act < kActivationCount, "batch_norm_act: unknown activation code");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor running_mean, OptionalTensor running_var, bool training, double momentum,
    double eps, int64_t act, double act_param) {
  check_common(x, weight, bias, act);
  const int64_t channels = x.size(1);
  check_channels(
      running_mean, x,
      "batch_norm_act: running_mean must have one value per channel of x, on its device");
  check_channels(running_var, x,
                 "batch_norm_act: running_var must have one value per channel of x, on its device");
  check(running_mean.has_value() == running_var.has_value(),
        "batch_norm_act: running_mean and running_var must either both be given or neither");
  check(training || running_mean.has_value(),
        "batch_norm_act: running_mean must be given when training is False");
  check(!running_mean.has_value() || running_mean->scalar_type() == running_var->scalar_type(),
        "batch_norm_act: running_mean and running_var must have the same dtype");
  check(!residual.has_value() || same_kind(*residual, x),
        "batch_norm_act: residual must have the shape, dtype and device of x");

  x = dense(x);
  residual = in_format_of(residual, x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  running_mean = contiguous(running_mean);
  running_var = contiguous(running_var);
  const ScalarType acc = acc_type(x.scalar_type());
  const bool writes_running = training && running_mean.has_value();
  const ScalarType running_type =
      running_mean.has_value() ? running_mean->scalar_type() : x.scalar_type();
  const int64_t running_size = writes_running ? channels : 0;
  Tensor out = allocate_like(x);
  Tensor mean = allocate_vector(x, channels, acc), rstd = allocate_vector(x, channels, acc);
  Tensor running_mean_out = allocate_vector(x, running_size, running_type);
  Tensor running_var_out = allocate_vector(x, running_size, running_type);

  BatchNormActForward p;
  p.shape = shape_of(x, weight, bias, running_mean);
  p.training = training;
  p.momentum = momentum;
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.residual = data(residual);
  p.weight = data(weight);
  p.bias = data(bias);
  p.running_mean = data(running_mean);
  p.running_var = data(running_var);
  p.out = data(out);
  p.mean = data(mean);
  p.rstd = data(rstd);
  p.running_mean_out = data_or_null(running_mean_out, writes_running);
  p.running_var_out = data_or_null(running_var_out, writes_running);
  if (training && x.numel() == 0) {
    // No batch to take statistics of: the running ones stay, as in torch.
    torch::stable::zero_(mean);
    torch::stable::fill_(rstd, 1.0 / std::sqrt(eps));
    if (writes_running) {
      torch::stable::copy_(running_mean_out, *running_mean);
      torch::stable::copy_(running_var_out, *running_var);
    }
    return {out, mean, rstd, running_mean_out, running_var_out};
  }
  Launch(x, [&] {
    return device::batch_norm_act_forward_workspace(p);
  }).run(device::batch_norm_act_forward, p);
  return {out, mean, rstd, running_mean_out, running_var_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor x, OptionalTensor saved,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    Tensor mean, Tensor rstd, bool training,
                                                    int64_t act, double act_param, int64_t z_source,
                                                    bool need_dx, bool need_dresidual) {
  using ZSource = BatchNormActBackward::ZSource;
  check_common(x, weight, bias, act);
  check(same_kind(dout, x),
        "batch_norm_act_backward: dout must have the shape, dtype and device of x");
  check(!saved.has_value() || same_kind(*saved, x),
        "batch_norm_act_backward: saved must have the shape, dtype and device of x");
  check(z_source >= 0 && z_source <= 2, "batch_norm_act_backward: unknown z_source");
  check((static_cast<ZSource>(z_source) != ZSource::input) == saved.has_value(),
        "batch_norm_act_backward: saved must be given exactly where z_source names it");
  check(static_cast<ZSource>(z_source) != ZSource::output ||
            static_cast<Activation>(act) == Activation::relu,
        "batch_norm_act_backward: only relu's derivative can be read off its output");
  const int64_t channels = x.size(1);
  const ScalarType acc = acc_type(x.scalar_type());
  for (const Tensor& t : {mean, rstd}) {
    check(
        t.dim() == 1 && t.size(0) == channels && t.scalar_type() == acc && t.device() == x.device(),
        "batch_norm_act_backward: mean and rstd must have one value per channel, as forward "
        "returned them");
  }

  x = dense(x);
  // Inductor may hand a gradient in another memory format than forward's output had.
  dout = in_format_of(dout, x);
  saved = in_format_of(saved, x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  mean = *contiguous(OptionalTensor(mean));
  rstd = *contiguous(OptionalTensor(rstd));
  Tensor dx = need_dx ? allocate_like(x) : allocate_vector(x, 0, x.scalar_type());
  Tensor dresidual = need_dresidual ? allocate_like(x) : allocate_vector(x, 0, x.scalar_type());
  Tensor dweight = allocate_vector(x, channels, acc), dbias = allocate_vector(x, channels, acc);

  BatchNormActBackward p;
  p.shape = shape_of(x, weight, bias, std::nullopt);
  p.training = training;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.z_source = static_cast<ZSource>(z_source);
  p.dout = data(dout);
  p.x = data(x);
  p.saved = data(saved);
  p.weight = data(weight);
  p.bias = data(bias);
  p.mean = data(mean);
  p.rstd = data(rstd);
  p.dx = data_or_null(dx, need_dx);
  p.dresidual = data_or_null(dresidual, need_dresidual);
  p.dweight = data(dweight);
  p.dbias = data(dbias);
  Launch(x, [&] {
    return device::batch_norm_act_backward_workspace(p);
  }).run(device::batch_norm_act_backward, p);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, ADVDL_DISPATCH_KEY, m) {
  m.impl("batch_norm_act", TORCH_BOX(&advdl_ops::forward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&advdl_ops::backward));
}
