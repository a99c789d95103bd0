#include "cuda/window_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops/window_attention.h"

namespace eva_attn::cuda {
Attention::Attention(const Call& call, const Geometry& geometry, int64_t num_landmarks,
                     const SummaryResults& landmarks, const Tensor& output, const Tensor& logsumexp,
                     cudaStream_t stream)
    : dtype_(kernel_dtype(call.query.scalar_type())), stream_(stream),
      has_entropy_(call.summary.tangent || call.attention.landmark_entropy),
      landmark_bias_(contiguous(call.attention.landmark_bias, logsumexp.scalar_type())),
      relative_bias_(call.attention.relative_bias ? call.attention.relative_bias->contiguous() : Tensor()),
      mask_(contiguous(call.key_padding_mask, at::kBool)), output_(output),
      logsumexp_(logsumexp.contiguous()) {
    const Shape shape = checked_shape(call, geometry);
    const OptionalTensor& dropout_seed = call.attention.dropout_seed;
    const bool exclude = call.attention.exclude_window_landmarks;
    if (num_landmarks > 0 && (mask_.defined() || exclude)) {
        const int64_t batch = mask_.defined() ? shape.batch : 1;
        extents_ = at::empty({batch, geometry.num_chunks(), 4}, logsumexp.options().dtype(at::kInt));
        chunk_extents(geometry, batch, mask_data(mask_), extents_.mutable_data_ptr<int32_t>(), stream);
    }
    const bool one_bias = relative_bias_.defined() && relative_bias_.size(0) == 1;
    params_ = AttentionParams{
        .shape = shape,
        .query = rows(call.query),
        .key = rows(call.key),
        .value = rows(call.value),
        .num_landmarks = num_landmarks,
        .landmark_key = landmarks.landmark_key,
        .landmark_value = landmarks.landmark_value,
        .landmark_bias = data(landmark_bias_),
        .landmark_entropy = landmarks.landmark_entropy,
        .extents = static_cast<const int32_t*>(data(extents_)),
        .extents_batch_stride = mask_.defined() ? 4 * geometry.num_chunks() : 0,
        .relative_bias_dtype = relative_bias_.defined() ? kernel_dtype(relative_bias_.scalar_type()) : dtype_,
        .relative_bias = data(relative_bias_),
        .relative_bias_head_stride = one_bias ? 0 : geometry.bias_height * geometry.bias_width,
        .key_padding_mask = mask_data(mask_),
        .exclude_window_landmarks = exclude,
        .dropout = dropout_of(call.attention),
        .dropout_seed = dropout_seed ? dropout_seed->const_data_ptr<int64_t>() : nullptr,
        .scale = scale_of(call),
        .output = rows(output_),
        .logsumexp = data(logsumexp_),
    };
}

void Attention::forward() const { forward_for(dtype_, params_)(dtype_, params_, stream_); }

void Attention::backward_global(const Tensor& grad_output, Room& room) {
    const Shape& shape = params_.shape;
    params_.grad_output = rows(grad_output);
    backward_ = backward_for(dtype_, params_);
    params_.pieces = backward_.global_pieces(dtype_, params_);
    const int64_t heads = shape.batch * shape.heads;
    const int64_t columns = params_.num_landmarks + shape.geometry.num_prefix_tokens;
    const int64_t sizes[] = {heads, params_.pieces, columns, shape.head_dim};
    const auto options = logsumexp_.options();
    delta_ = at::empty_like(logsumexp_);
    // Prefix keys' gradients are read while tokens' are written.
    const bool is_done_before = backward_.on_tensor_cores && shape.geometry.num_prefix_tokens == 0;
    params_.rounded_gradients = is_done_before && params_.pieces == 1;
    const auto row_options = params_.rounded_gradients ? output_.options() : options;
    const auto empty = [&](bool in_room) {
        return in_room ? room.empty(sizes, row_options) : at::empty(sizes, row_options);
    };
    grad_global_key_ = empty(is_done_before);
    // Rounded, those of values are what the tokens' gradients need, too.
    grad_global_value_ = empty(is_done_before && !params_.rounded_gradients);
    params_.delta = data(delta_);
    params_.grad_global_key = data(grad_global_key_);
    params_.grad_global_value = data(grad_global_value_);
    if (has_entropy_) {
        grad_landmark_entropy_ = at::empty({heads, params_.pieces, params_.num_landmarks}, options);
        params_.grad_landmark_entropy = data(grad_landmark_entropy_);
    }
    backward_.run_global(dtype_, params_, stream_);
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
        params_.bias_pieces = backward_.bias_pieces(dtype_, params_);
        bias_terms = at::empty(
            {shape.heads, shape.batch, params_.bias_pieces, geometry.bias_height, geometry.bias_width},
            logsumexp_.options());
        params_.grad_relative_bias = data(bias_terms);
    }
    Tensor prefix_terms;
    if (geometry.num_prefix_tokens > 0 && backward_.on_tensor_cores) {
        params_.prefix_pieces = mma::prefix_pieces(dtype_, params_);
        prefix_terms = at::empty(
            {shape.batch * shape.heads, params_.prefix_pieces, geometry.num_prefix_tokens, shape.head_dim},
            logsumexp_.options());
        params_.grad_prefix_query = data(prefix_terms);
    }
    backward_.run(dtype_, params_, stream_);

    if (!relative_bias_.defined()) return;
    const int64_t heads = relative_bias_.size(0); // or 1 for all
    sum_bias_gradient(kernel_dtype(logsumexp_.scalar_type()),
                      BiasGradient{
                          .terms = data(bias_terms),
                          .heads = heads,
                          .pieces = shape.heads / heads * shape.batch * params_.bias_pieces,
                          .entries = geometry.bias_height * geometry.bias_width,
                          .data = data(grad_relative_bias),
                          .dtype = kernel_dtype(grad_relative_bias.scalar_type()),
                      },
                      stream_);
}

namespace {

// The landmarks that a call was given, as kernels take them.
struct Landmarks {
    explicit Landmarks(const Call& call)
        : key(contiguous(call.landmark_key, call.query.scalar_type())),
          value(contiguous(call.landmark_value, call.query.scalar_type())),
          entropy(contiguous(call.attention.landmark_entropy, accumulation_dtype(call.query.scalar_type()))),
          count(call.landmark_key ? concrete(call.geometry).num_chunks() : 0) {}

    SummaryResults data() const {
        return {.landmark_key = eva_attn::data(key),
                .landmark_value = eva_attn::data(value),
                .landmark_entropy = eva_attn::data(entropy)};
    }

    Tensor key, value, entropy;
    int64_t count;
};

void forward(const Call& call, const Tensors<2>& outputs) {
    const auto& [output, logsumexp] = outputs;
    const Landmarks landmarks(call);
    run(WindowAttention::kName, call, [&](cudaStream_t stream) {
        Attention(call, concrete(call.geometry), landmarks.count, landmarks.data(), output, logsumexp, stream)
            .forward();
    });
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<2>& outputs,
              const Tensors<7>& gradients) {
    const auto& [output, logsumexp] = outputs;
    const auto& [grad_query, grad_key, grad_value, grad_landmark_key, grad_landmark_value, grad_relative_bias,
                 grad_landmark_entropy] = gradients;
    const Landmarks landmarks(call);
    run(WindowAttention::kBackwardName, call, [&](cudaStream_t stream) {
        Attention attention(call, concrete(call.geometry), landmarks.count, landmarks.data(), output,
                            logsumexp, stream);
        Room none;
        attention.backward_global(grad_output, none);
        attention.backward_tokens(ChunkTerms{}, grad_query, grad_key, grad_value, grad_relative_bias);
        if (!call.landmark_key) return;
        const auto sum_pieces = [](const Tensor& terms, const Tensor& gradient) {
            const int64_t sizes[] = {terms.size(0), gradient.size(2), gradient.size(3)};
            sum_into(gradient.view(sizes), terms.narrow(2, 0, gradient.size(2)), {1});
        };
        sum_pieces(attention.grad_global_key(), grad_landmark_key);
        sum_pieces(attention.grad_global_value(), grad_landmark_value);
        if (call.attention.landmark_entropy)
            sum_into(grad_landmark_entropy.flatten(0, 1), attention.grad_landmark_entropy(), {1});
    });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) { WindowAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cuda
