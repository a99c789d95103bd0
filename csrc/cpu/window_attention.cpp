#include "cpu/window_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <cmath>

#include "ops/window_attention.h"

namespace eva_attn::cpu {
namespace {

// Enough tasks for the threads of a large machine; of the shape alone, so that results are too.
constexpr int64_t kTasks = 16;

int64_t count_pieces(const Shape& shape) {
    const int64_t wanted = detail::ceil_div(kTasks, std::max<int64_t>(shape.batch * shape.heads, 1));
    return std::max<int64_t>(std::min(wanted, shape.geometry.num_windows()), 1);
}

Dropout dropout_of(const AttentionOptions& options) {
    if (options.dropout_p == 0) return Dropout{.seed = 0, .threshold = 0, .scale = 1};
    return Dropout{.seed = static_cast<uint64_t>(*options.dropout_seed->const_data_ptr<int64_t>()),
                   .threshold = static_cast<uint64_t>(std::ceil(std::ldexp(options.dropout_p, 32))),
                   .scale = 1 / (1 - options.dropout_p)};
}

} // namespace

Attention::Attention(const Call& call, const Geometry& geometry, const OptionalTensor& landmark_key,
                     const OptionalTensor& landmark_value, const Tensor& output, const Tensor& logsumexp)
    : kernels_(kernels_for(call.query.scalar_type())),
      landmark_key_(contiguous(landmark_key, call.query.scalar_type())),
      landmark_value_(contiguous(landmark_value, call.query.scalar_type())),
      landmark_bias_(contiguous(call.attention.landmark_bias, logsumexp.scalar_type())),
      relative_bias_(contiguous(call.attention.relative_bias, logsumexp.scalar_type())),
      mask_(contiguous(call.key_padding_mask, at::kBool)), output_(output),
      logsumexp_(logsumexp.contiguous()) {
    const Shape shape = shape_of(call, geometry);
    if (landmark_key) extents_ = chunk_extents(shape, mask_);
    const bool one_bias = relative_bias_.defined() && relative_bias_.size(0) == 1;
    params_ = AttentionParams{
        .shape = shape,
        .query = rows(call.query),
        .key = rows(call.key),
        .value = rows(call.value),
        .num_landmarks = landmark_key ? geometry.num_chunks() : 0,
        .landmark_key = data(landmark_key_),
        .landmark_value = data(landmark_value_),
        .landmark_bias = data(landmark_bias_),
        .extents = static_cast<const int32_t*>(data(extents_)),
        .extents_batch_stride = mask_.defined() ? 4 * geometry.num_chunks() : 0,
        .relative_bias = data(relative_bias_),
        .relative_bias_head_stride = one_bias ? 0 : geometry.bias_height * geometry.bias_width,
        .key_padding_mask = mask_data(mask_),
        .exclude_window_landmarks = call.attention.exclude_window_landmarks,
        .dropout = dropout_of(call.attention),
        .scale = scale_of(call),
        .pieces = count_pieces(shape),
        .output = rows(output_),
        .logsumexp = data(logsumexp_),
        .grad_output = {},
        .grad_query = {},
        .grad_key = {},
        .grad_value = {},
        .grad_global_key = nullptr,
        .grad_global_value = nullptr,
        .grad_relative_bias = nullptr,
        .chunk_terms = {},
    };
}

void Attention::forward() const {
    run(kernels_.window_attention_fwd, kernels_.attention_scratch, params_, tasks());
    if (params_.shape.geometry.num_prefix_tokens == 0) return;
    run(kernels_.prefix_attention_fwd, kernels_.prefix_scratch, params_,
        params_.shape.batch * params_.shape.heads);
}

void Attention::backward_global(const Tensor& grad_output) {
    params_.grad_output = rows(grad_output);
    const Shape& shape = params_.shape;
    const int64_t num_rows = params_.num_landmarks + shape.geometry.num_prefix_tokens;
    if (num_rows == 0) return;
    const int64_t sizes[] = {shape.batch * shape.heads, params_.pieces, num_rows, padded(shape.head_dim)};
    grad_global_key_ = at::empty(sizes, logsumexp_.options());
    grad_global_value_ = at::empty(sizes, logsumexp_.options());
    params_.grad_global_key = data(grad_global_key_);
    params_.grad_global_value = data(grad_global_value_);
    run(kernels_.window_attention_bwd_global, kernels_.attention_scratch, params_, tasks());
}

void Attention::backward_tokens(const ChunkTerms& chunk_terms, const Tensor& grad_query,
                                const Tensor& grad_key, const Tensor& grad_value,
                                const Tensor& grad_relative_bias) {
    const Shape& shape = params_.shape;
    const Geometry& geometry = shape.geometry;
    params_.grad_query = rows(grad_query);
    params_.grad_key = rows(grad_key);
    params_.grad_value = rows(grad_value);
    params_.chunk_terms = chunk_terms;
    Tensor bias_terms;
    if (relative_bias_.defined()) {
        bias_terms =
            at::zeros({shape.batch, shape.heads, params_.pieces, geometry.bias_height, geometry.bias_width},
                      logsumexp_.options());
        params_.grad_relative_bias = data(bias_terms);
    }

    run(kernels_.window_attention_bwd, kernels_.attention_scratch, params_, tasks());
    if (geometry.num_prefix_tokens > 0) {
        run(kernels_.prefix_attention_bwd, kernels_.prefix_scratch, params_, shape.batch * shape.heads);
    }

    if (!relative_bias_.defined()) return;
    Tensor sum = sum_in_order(sum_in_order(bias_terms).transpose(0, 1)); // [H, height, width]
    if (relative_bias_.size(0) == 1) sum = sum_in_order(sum).unsqueeze(0);
    grad_relative_bias.copy_(sum);
}

namespace {

void forward(const Call& call, const Tensors<2>& outputs) {
    const auto& [output, logsumexp] = outputs;
    Attention(call, concrete(call.geometry), call.landmark_key, call.landmark_value, output, logsumexp)
        .forward();
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<2>& outputs,
              const Tensors<6>& gradients) {
    const auto& [output, logsumexp] = outputs;
    const auto& [grad_query, grad_key, grad_value, grad_landmark_key, grad_landmark_value,
                 grad_relative_bias] = gradients;
    const Geometry geometry = concrete(call.geometry);
    Attention attention(call, geometry, call.landmark_key, call.landmark_value, output, logsumexp);
    attention.backward_global(grad_output);
    attention.backward_tokens(ChunkTerms{}, grad_query, grad_key, grad_value, grad_relative_bias);

    const auto sum_pieces = [&](const Tensor& terms, const Tensor& gradient) {
        if (gradient.numel() == 0) return;
        const Tensor sum = sum_in_order(terms.transpose(0, 1)); // [B H, C + P, padded D]
        gradient.copy_(
            sum.narrow(1, 0, gradient.size(2)).narrow(2, 0, gradient.size(3)).reshape(gradient.sizes()));
    };
    sum_pieces(attention.grad_global_key(), grad_landmark_key);
    sum_pieces(attention.grad_global_value(), grad_landmark_value);
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { WindowAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
