#include "cpu/window_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <algorithm>

#include "ops/window_attention.h"

namespace eva_attn::cpu {
namespace {

// Enough tasks for the threads of a large machine; of the shape alone, so that results are too.
constexpr int64_t kTasks = 8;

int64_t count_pieces(const Shape& shape) {
    return detail::ceil_div(kTasks, std::max<int64_t>(shape.batch * shape.heads, 1));
}

// How many shares of at most `size` something falls into, one at least.
int64_t shares_of(int64_t total, int64_t size) {
    return std::max<int64_t>(detail::ceil_div(total, std::max<int64_t>(size, 1)), 1);
}

} // namespace

Attention::Attention(const Call& call, const Geometry& geometry, const OptionalTensor& landmark_key,
                     const OptionalTensor& landmark_value, const OptionalTensor& landmark_entropy,
                     const Tensor& output, const Tensor& logsumexp)
    : kernels_(kernels_for(call.query.scalar_type())),
      landmark_key_(contiguous(landmark_key, call.query.scalar_type())),
      landmark_value_(contiguous(landmark_value, call.query.scalar_type())),
      landmark_bias_(contiguous(call.attention.landmark_bias, logsumexp.scalar_type())),
      landmark_entropy_(contiguous(landmark_entropy, logsumexp.scalar_type())),
      relative_bias_(contiguous(call.attention.relative_bias, logsumexp.scalar_type())),
      mask_(contiguous(call.key_padding_mask, at::kBool)), output_(output),
      logsumexp_(logsumexp.contiguous()) {
    const Shape shape = shape_of(call, geometry);
    const Blocks blocks(geometry);
    const int64_t wanted = count_pieces(shape), windows = geometry.num_windows();
    const int64_t windows_per_task = blocks.count > 1 ? blocks.windows : detail::ceil_div(windows, wanted);
    const int64_t tasks = shares_of(windows, windows_per_task);
    const int64_t tasks_per_piece = blocks.count > 1 ? detail::ceil_div(tasks, wanted) : 1;
    if (landmark_key) extents_ = chunk_extents(shape, mask_);
    Dropout dropout = dropout_of(call.attention);
    if (dropout.threshold)
        dropout.seed = static_cast<uint64_t>(*call.attention.dropout_seed->const_data_ptr<int64_t>());
    const bool one_bias = relative_bias_.defined() && relative_bias_.size(0) == 1;
    params_ = AttentionParams{
        .shape = shape,
        .first_head = 0,
        .query = rows(call.query),
        .key = rows(call.key),
        .value = rows(call.value),
        .num_landmarks = landmark_key ? geometry.num_chunks() : 0,
        .landmark_key = landmark_key ? rows(landmark_key_) : Rows{},
        .landmark_value = landmark_key ? rows(landmark_value_) : Rows{},
        .landmark_bias = data(landmark_bias_),
        .landmark_entropy = data(landmark_entropy_),
        .extents = static_cast<const int32_t*>(data(extents_)),
        .extents_batch_stride = mask_.defined() ? 4 * geometry.num_chunks() : 0,
        .relative_bias = data(relative_bias_),
        .relative_bias_head_stride = one_bias ? 0 : geometry.bias_height * geometry.bias_width,
        .key_padding_mask = mask_data(mask_),
        .exclude_window_landmarks = call.attention.exclude_window_landmarks,
        .dropout = dropout,
        .scale = scale_of(call),
        .tasks = tasks,
        .windows_per_task = windows_per_task,
        .tasks_per_piece = tasks_per_piece,
        .pieces = shares_of(tasks, tasks_per_piece),
        .output = rows(output_),
        .logsumexp = data(logsumexp_),
        .grad_output = {},
        .grad_query = {},
        .grad_key = {},
        .grad_value = {},
        .grad_global_key = nullptr,
        .grad_global_value = nullptr,
        .grad_landmark_entropy = nullptr,
        .grad_relative_bias = nullptr,
    };
}

void Attention::forward(std::vector<Stage>& stages) const {
    stages.push_back(stage(kernels_.window_attention_fwd, params_, params_.tasks,
                           kernels_.attention_scratch(params_, false)));
    if (params_.shape.geometry.num_prefix_tokens > 0)
        stages.push_back(
            stage(kernels_.prefix_attention_fwd, params_, 1, kernels_.prefix_scratch(params_, false)));
}

void Attention::backward(std::vector<Stage>& stages, const Tensor& grad_output, const Tensor& grad_query,
                         const Tensor& grad_key, const Tensor& grad_value, int64_t heads) {
    const Shape& shape = params_.shape;
    const Geometry& geometry = shape.geometry;
    const auto options = logsumexp_.options();
    const int64_t globals = params_.num_landmarks + geometry.num_prefix_tokens;
    grad_global_key_ = at::empty({heads, params_.pieces, globals, padded(shape.head_dim)}, options);
    grad_global_value_ = at::empty_like(grad_global_key_);
    if (landmark_entropy_.defined())
        grad_landmark_entropy_ = at::empty({heads, params_.pieces, params_.num_landmarks}, options);
    if (relative_bias_.defined())
        bias_terms_ = at::empty(
            {shape.batch, shape.heads, params_.pieces, geometry.bias_height, geometry.bias_width}, options);

    params_.grad_output = rows(grad_output);
    params_.grad_query = rows(grad_query);
    params_.grad_key = rows(grad_key);
    params_.grad_value = rows(grad_value);
    params_.grad_global_key = data(grad_global_key_);
    params_.grad_global_value = data(grad_global_value_);
    params_.grad_landmark_entropy = data(grad_landmark_entropy_);
    params_.grad_relative_bias = data(bias_terms_);
    stages.push_back(stage(kernels_.window_attention_bwd, params_, params_.tasks,
                           kernels_.attention_scratch(params_, true), params_.tasks_per_piece));
    if (geometry.num_prefix_tokens > 0)
        stages.push_back(
            stage(kernels_.prefix_attention_bwd, params_, 1, kernels_.prefix_scratch(params_, true)));
}

void Attention::relative_bias_gradient(const Tensor& grad_relative_bias) const {
    if (!relative_bias_.defined()) return;
    Tensor sum = sum_in_order(sum_in_order(bias_terms_).transpose(0, 1)); // [H, height, width]
    if (relative_bias_.size(0) == 1) sum = sum_in_order(sum).unsqueeze(0);
    grad_relative_bias.copy_(sum);
}

namespace {

void forward(const Call& call, const Tensors<2>& outputs) {
    const auto& [output, logsumexp] = outputs;
    const Attention attention(call, concrete(call.geometry), call.landmark_key, call.landmark_value,
                              call.attention.landmark_entropy, output, logsumexp);
    std::vector<Stage> stages;
    attention.forward(stages);
    run(stages, call.query.size(0) * call.query.size(1), attention.blocks(), Direction::kForward);
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<2>& outputs,
              const Tensors<7>& gradients) {
    const auto& [output, logsumexp] = outputs;
    const auto& [grad_query, grad_key, grad_value, grad_landmark_key, grad_landmark_value, grad_relative_bias,
                 grad_landmark_entropy] = gradients;
    const Geometry geometry = concrete(call.geometry);
    Attention attention(call, geometry, call.landmark_key, call.landmark_value,
                        call.attention.landmark_entropy, output, logsumexp);
    std::vector<Stage> stages;
    const int64_t heads = call.query.size(0) * call.query.size(1);
    attention.backward(stages, grad_output, grad_query, grad_key, grad_value, heads);
    run(stages, heads, attention.blocks(), Direction::kBackward);
    attention.relative_bias_gradient(grad_relative_bias);

    const auto sum_pieces = [&](const Tensor& terms, const Tensor& gradient) {
        if (gradient.numel() == 0) return;
        const Tensor sum = sum_in_order(terms.transpose(0, 1)); // [B H, C + P, padded D]
        gradient.copy_(
            sum.narrow(1, 0, gradient.size(2)).narrow(2, 0, gradient.size(3)).reshape(gradient.sizes()));
    };
    sum_pieces(attention.grad_global_key(), grad_landmark_key);
    sum_pieces(attention.grad_global_value(), grad_landmark_value);
    if (call.attention.landmark_entropy)
        grad_landmark_entropy.copy_(sum_in_order(attention.grad_landmark_entropy().transpose(0, 1))
                                        .reshape(grad_landmark_entropy.sizes()));
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { WindowAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
