// torch.ops.advdl_ops.batch_norm_act and its backward: argument checks, allocation, registration.
#include "../common/batch_norm_act.h"

#include <cmath>
#include <tuple>

#include "tensor.h"

namespace advdl_ops {
namespace {

constexpr const char *kName = "batch_norm_act", *kApplyName = "batch_norm_act_apply",
                     *kBackwardName = "batch_norm_act_backward",
                     *kMomentsName = "batch_norm_moments",
                     *kInputGradientName = "batch_norm_act_input_gradient";

BatchNormActShape shape_of(const Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running) {
  BatchNormActShape shape;
  shape.n = x.size(0);
  shape.c = x.size(1);
  shape.s = positions(x);
  shape.layout = layout_of(x);
  shape.dtype = dtype_of(x, kName);
  const OptionalTensor& affine = weight.has_value() ? weight : bias;
  if (affine.has_value()) shape.weight_dtype = dtype_of(*affine, kName);
  if (running.has_value()) shape.running_dtype = dtype_of(*running, kName);
  return shape;
}

void check_common(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  int64_t act) {
  check(x.dim() >= 2 && x.dim() <= 5, kName, "x must have 2 to 5 dimensions");
  check_affine(kName, x, weight, bias, act);
}

void launch(const Tensor& x, const BatchNormActForward& p) {
  Launch(x, [&] {
    return device::batch_norm_act_forward_workspace(p);
  }).run(device::batch_norm_act_forward, p);
}

void launch(const Tensor& x, const BatchNormActBackward& p) {
  Launch(x, [&] {
    return device::batch_norm_act_backward_workspace(p);
  }).run(device::batch_norm_act_backward, p);
}

struct ForwardOptions {
  bool training;
  double momentum, eps;
  int64_t act;
  double act_param;
};

// `in_place`: the new running statistics overwrite the old ones. Otherwise they go to running_out [2, C].
struct ForwardOutputs {
  Tensor out, stats;  // as x; [2, C] acc: mean, rstd
  OptionalTensor running_out;
};
ForwardOutputs run_forward(Tensor x, OptionalTensor residual, OptionalTensor weight,
                           OptionalTensor bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const ForwardOptions& options,
                           bool in_place) {
  const bool training = options.training;
  check_common(x, weight, bias, options.act);
  const int64_t channels = x.size(1);
  check(is_per_channel(running_mean, x), kName,
        "running_mean must have one value per channel of x, on its device");
  check(is_per_channel(running_var, x), kName,
        "running_var must have one value per channel of x, on its device");
  check(running_mean.has_value() == running_var.has_value(), kName,
        "running_mean and running_var must either both be given or neither");
  check(training || running_mean.has_value(), kName,
        "running_mean must be given when training is False");
  check(!running_mean.has_value() || running_mean->scalar_type() == running_var->scalar_type(),
        kName, "running_mean and running_var must have the same dtype");
  check(goes_with(running_mean, x.scalar_type()), kName,
        "the running statistics must be of x's dtype, or float32 beside a half x");
  check_residual(kName, residual, x);
  check(training ? options.eps > 0 : options.eps >= 0, kName, "eps is out of range");
  check(!training || x.numel() != channels || channels == 0, kName,
        "more than one value per channel is needed in training");

  for (const OptionalTensor& t : {running_mean, running_var}) {
    check(!in_place || !training || !t.has_value() || t->stride(0) != 0 || channels <= 1, kName,
          "the running statistics must not be expanded, to be written");
  }

  x = dense(x);
  residual = in_format_of(residual, x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  const OptionalTensor old_mean = contiguous(running_mean), old_var = contiguous(running_var);
  const bool writes_running = training && running_mean.has_value();
  ForwardOutputs outputs{allocate_like(x), allocate_pair(x, channels, acc_type(x.scalar_type())),
                         std::nullopt};
  if (!in_place) {
    const ScalarType dtype =
        running_mean.has_value() ? running_mean->scalar_type() : x.scalar_type();
    outputs.running_out = allocate_pair(x, writes_running ? channels : 0, dtype);
  }

  BatchNormActForward p;
  p.shape = shape_of(x, weight, bias, running_mean);
  p.training = training;
  p.momentum = options.momentum;
  p.eps = options.eps;
  p.act = static_cast<Activation>(options.act);
  p.act_param = options.act_param;
  p.x = data(x);
  p.residual = data(residual);
  p.weight = data(weight);
  p.bias = data(bias);
  p.running_mean = data(old_mean);
  p.running_var = data(old_var);
  p.out = data(outputs.out);
  p.mean = data(outputs.stats);
  p.rstd = second_of_pair(outputs.stats);
  if (writes_running) {
    p.running_mean_out = in_place ? data(old_mean) : data(outputs.running_out);
    p.running_var_out = in_place ? data(old_var) : second_of_pair(*outputs.running_out);
  }
  if (training && x.numel() == 0) {
    // Without elements there are no batch statistics: the running ones do not change, as in torch.
    torch::stable::zero_(outputs.stats);
    Tensor rstd = torch::stable::select(outputs.stats, 0, 1);
    torch::stable::fill_(rstd, 1.0 / std::sqrt(options.eps));
    if (writes_running && !in_place) {
      Tensor mean_out = torch::stable::select(*outputs.running_out, 0, 0);
      Tensor var_out = torch::stable::select(*outputs.running_out, 0, 1);
      torch::stable::copy_(mean_out, *running_mean);
      torch::stable::copy_(var_out, *running_var);
    }
    return outputs;
  }
  launch(x, p);
  if (in_place && writes_running) {
    // If the kernel wrote to a contiguous copy, copy the result back.
    for (const auto& [given, written] :
         {std::pair{&running_mean, &old_mean}, std::pair{&running_var, &old_var}}) {
      if ((*given)->is_contiguous()) continue;
      Tensor target = **given;
      torch::stable::copy_(target, **written);
    }
  }
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, OptionalTensor residual, OptionalTensor weight,
                                           OptionalTensor bias, OptionalTensor running_mean,
                                           OptionalTensor running_var, bool training,
                                           double momentum, double eps, int64_t act,
                                           double act_param) {
  ForwardOutputs o = run_forward(x, residual, weight, bias, running_mean, running_var,
                                 {training, momentum, eps, act, act_param}, false);
  return {o.out, o.stats, *o.running_out};
}

std::tuple<Tensor, Tensor> forward_(Tensor x, OptionalTensor residual, OptionalTensor weight,
                                    OptionalTensor bias, OptionalTensor running_mean,
                                    OptionalTensor running_var, bool training, double momentum,
                                    double eps, int64_t act, double act_param) {
  ForwardOutputs o = run_forward(x, residual, weight, bias, running_mean, running_var,
                                 {training, momentum, eps, act, act_param}, true);
  return {o.out, o.stats};
}

bool is_acc_pair(const Tensor& t, const Tensor& x) {
  return t.dim() == 2 && t.size(0) == 2 && t.size(1) == x.size(1) &&
         t.scalar_type() == acc_type(x.scalar_type()) && t.device() == x.device();
}

void check_stats(const char* function, const Tensor& stats, const Tensor& x) {
  check(is_acc_pair(stats, x), function, "stats must be [2, C] as forward returned them");
}

Tensor apply(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
             Tensor stats, int64_t act, double act_param) {
  check_common(x, weight, bias, act);
  check_residual(kName, residual, x);
  check_stats(kApplyName, stats, x);
  x = dense(x);
  residual = in_format_of(residual, x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  stats = *contiguous(OptionalTensor(stats));
  Tensor out = allocate_like(x);

  BatchNormActForward p;
  p.shape = shape_of(x, weight, bias, std::nullopt);
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.residual = data(residual);
  p.weight = data(weight);
  p.bias = data(bias);
  p.out = data(out);
  p.mean = data(stats);
  p.rstd = second_of_pair(stats);
  launch(x, p);
  return out;
}

// [2, C] acc: mean of each channel, and sum of squared distances from it.
Tensor moments(Tensor x) {
  check_common(x, std::nullopt, std::nullopt, static_cast<int64_t>(Activation::identity));
  x = dense(x);
  Tensor result = allocate_pair(x, x.size(1), acc_type(x.scalar_type()));
  if (x.numel() == 0) {
    torch::stable::zero_(result);
    return result;
  }
  BatchNormActForward p;
  p.shape = shape_of(x, std::nullopt, std::nullopt, std::nullopt);
  p.training = true;
  p.x = data(x);
  p.mean = data(result);
  p.rstd = second_of_pair(result);
  launch(x, p);
  return result;
}

// What the operators of the backward read, checked and as the kernels take it, and the parameters made of it.
struct BackwardCall {
  Tensor dout, x;
  OptionalTensor saved, weight, bias;
  Tensor stats;
  BatchNormActBackward p;

  BackwardCall(const char* function, const Tensor& given_dout, const Tensor& given_x,
               const OptionalTensor& given_saved, const OptionalTensor& given_weight,
               const OptionalTensor& given_bias, const Tensor& given_stats, int64_t act,
               double act_param, int64_t z_source)
      : dout(given_dout), x(given_x), stats(given_stats) {
    check_common(x, given_weight, given_bias, act);
    check_backward(function, dout, x, given_saved, act, z_source);
    check_stats(function, stats, x);
    x = dense(x);
    // Inductor may pass a gradient whose memory format differs from that of forward's output.
    dout = in_format_of(dout, x);
    saved = in_format_of(given_saved, x);
    weight = contiguous(given_weight);
    bias = contiguous(given_bias);
    stats = *contiguous(OptionalTensor(stats));

    p.shape = shape_of(x, weight, bias, std::nullopt);
    p.act = static_cast<Activation>(act);
    p.act_param = act_param;
    p.z_source = static_cast<ZSource>(z_source);
    p.dout = data(dout);
    p.x = data(x);
    p.saved = data(saved);
    p.weight = data(weight);
    p.bias = data(bias);
    p.mean = data(stats);
    p.rstd = second_of_pair(stats);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor x, OptionalTensor saved,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    Tensor stats, bool training, int64_t act,
                                                    double act_param, int64_t z_source,
                                                    bool need_dx, bool need_dresidual) {
  BackwardCall call(kBackwardName, dout, x, saved, weight, bias, stats, act, act_param, z_source);
  const Tensor& like = call.x;
  const int64_t channels = like.size(1);
  const ScalarType acc = acc_type(like.scalar_type());
  Tensor dx = need_dx ? allocate_like(like) : allocate_vector(like, 0, like.scalar_type());
  Tensor dresidual =
      need_dresidual ? allocate_like(like) : allocate_vector(like, 0, like.scalar_type());
  Tensor dweight = allocate_vector(like, channels, acc),
         dbias = allocate_vector(like, channels, acc);
  call.p.training = training;
  call.p.dx = data_or_null(dx, need_dx);
  call.p.dresidual = data_or_null(dresidual, need_dresidual);
  call.p.dweight = data(dweight);
  call.p.dbias = data(dbias);
  launch(call.x, call.p);
  return {dx, dresidual, dweight, dbias};
}

// dx if the batch is a part of a larger one. means [2, C]: those of dz * xhat and of dz over all of it.
Tensor input_gradient(Tensor dout, Tensor x, OptionalTensor saved, OptionalTensor weight,
                      OptionalTensor bias, Tensor stats, Tensor means, int64_t act,
                      double act_param, int64_t z_source) {
  BackwardCall call(kInputGradientName, dout, x, saved, weight, bias, stats, act, act_param,
                    z_source);
  check(is_acc_pair(means, x), kInputGradientName, "means must be [2, C] like stats");
  means = *contiguous(OptionalTensor(means));
  Tensor dx = allocate_like(call.x);
  call.p.training = call.p.means_given = true;
  call.p.dx = data(dx);
  call.p.dweight = data(means);
  call.p.dbias = second_of_pair(means);
  launch(call.x, call.p);
  return dx;
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, ADVDL_DISPATCH_KEY, m) {
  m.impl("batch_norm_act", TORCH_BOX(&advdl_ops::forward));
  m.impl("batch_norm_act_", TORCH_BOX(&advdl_ops::forward_));
  m.impl("batch_norm_act_apply", TORCH_BOX(&advdl_ops::apply));
  m.impl("batch_norm_act_backward", TORCH_BOX(&advdl_ops::backward));
  m.impl("batch_norm_act_input_gradient", TORCH_BOX(&advdl_ops::input_gradient));
  m.impl("batch_norm_moments", TORCH_BOX(&advdl_ops::moments));
}
