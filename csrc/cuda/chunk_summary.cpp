#include "cuda/chunk_summary.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "ops/chunk_summary.h"

namespace eva_attn::cuda {

Summary::Summary(const Call& call, const Geometry& geometry, const SummaryResults& results)
    : dtype_(kernel_dtype(call.query.scalar_type())), row_dtype_(call.query.scalar_type()),
      accumulation_(accumulation_dtype(row_dtype_)), device_(call.query.device()),
      key_projection_(projection_tensors(call.summary.key, accumulation_)),
      query_projection_(projection_tensors(call.summary.query, accumulation_)),
      mask_(contiguous(call.key_padding_mask, at::kBool)),
      noise_(contiguous(call.summary.noise, accumulation_)),
      params_{
          .shape = checked_shape(call, geometry),
          .query = rows(call.query),
          .key = rows(call.key),
          .value = rows(call.value),
          .key_padding_mask = mask_data(mask_),
          .noise = data(noise_),
          .key_projection = projection(key_projection_),
          .query_projection = projection(query_projection_),
          .has_projection = call.summary.key.weight.has_value(),
          .has_query_projection = call.summary.query.weight.has_value(),
          .tangent = call.summary.tangent,
          .scale = scale_of(call),
          .mu_scale = call.summary.tangent || geometry.is_causal ? 1 : 0.5,
          .norm_eps = call.summary.norm_eps,
          .mean_divisor = call.summary.mean_divisor.guard_int(__FILE__, __LINE__),
          .landmark_key = results.landmark_key,
          .landmark_value = results.landmark_value,
          .key_mean = results.key_mean,
          .query_mean = results.query_mean,
          .rounded_mean = results.key_mean == nullptr,
          .omega_rows = results.omega,
          .landmark_entropy = results.landmark_entropy,
      } {}

void Summary::allocate_means() {
    const Shape& shape = params_.shape;
    means_ =
        at::empty({2, shape.batch * shape.heads, shape.geometry.num_chunks(), shape.head_dim}, options());
    params_.key_mean = data(means_);
    params_.query_mean = data(means_.select(0, 1));
    params_.rounded_mean = false;
}

void Summary::forward_again(SummaryParams params, cudaStream_t stream) const {
    const Shape& shape = params.shape;
    const Tensor landmarks =
        at::empty({2, shape.batch * shape.heads, shape.geometry.num_chunks(), shape.head_dim},
                  options().dtype(row_dtype_));
    params.landmark_key = data(landmarks);
    params.landmark_value = data(landmarks.select(0, 1));
    forward_for(dtype_, params)(dtype_, params, stream);
}

void Summary::forward(cudaStream_t stream) {
    const SummaryForward forward = forward_for(dtype_, params_);
    if (!params_.rounded_mean || forward != &simt::chunk_summary_fwd) return forward(dtype_, params_, stream);
    void* const rounded = params_.query_mean;
    allocate_means();
    forward(dtype_, params_, stream);
    const Tensor query_mean = means_.select(0, 1);
    if (query_mean.numel() == 0) return;
    at::from_blob(rounded, query_mean.sizes(), query_mean.options().dtype(row_dtype_)).copy_(query_mean);
}

void Summary::backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                       const Tensor& grad_landmark_entropy, const Tensors<8>& grad_weights,
                       cudaStream_t stream, Room& room) {
    const Shape& shape = params_.shape;
    const Geometry& geometry = shape.geometry;
    const auto options = this->options();
    const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, options); };
    const int64_t heads = shape.batch * shape.heads, num_chunks = geometry.num_chunks();
    const SummaryBackward backward = backward_for(dtype_, params_);
    const int64_t per_chunk[] = {heads, num_chunks, shape.head_dim};
    if (params_.rounded_mean && !backward.on_tensor_cores) {
        allocate_means();
        forward_again(params_, stream);
    }
    rounded_terms_ = backward.on_tensor_cores;
    const auto row_options = rounded_terms_ ? options.dtype(row_dtype_) : options;
    omega_ = at::empty(per_chunk, row_options);
    params_.rounded_gradients =
        backward.on_tensor_cores && grad_landmark_value.scalar_type() != accumulation_;
    grad_beta_ = params_.rounded_gradients ? grad_landmark_value : at::empty(per_chunk, row_options);
    const Tensor grad_means = at::empty({2, heads, num_chunks, shape.head_dim}, row_options);
    grad_key_mean_ = grad_means.select(0, 0);
    grad_query_mean_ = grad_means.select(0, 1);
    if (params_.tangent) {
        grad_entropy_ = empty({heads, num_chunks});
        params_.grad_entropy = data(grad_entropy_);
        params_.grad_landmark_entropy = data(grad_landmark_entropy);
    }
    const bool half = dtype_ == DType::kBFloat16 || dtype_ == DType::kHalf;
    chunk_stats_ = at::empty({heads, num_chunks, 2}, options.dtype(half ? at::kFloat : at::kDouble));
    if (geometry.chunk_overlap_y == 0 && geometry.chunk_overlap_x == 0) {
        token_weight_ = empty({heads, geometry.num_tokens()});
        token_grad_ = empty({heads, geometry.num_tokens()});
    }
    Tensor grad_projections, projection_rows, omega_rows, grad_mu;
    if (!backward.on_tensor_cores) {
        params_.omega_rows = nullptr;
    } else if (!has_few_members(shape)) {
        grad_mu = room.empty(per_chunk, options);
        if (!params_.omega_rows) {
            const Tensor means = empty({2, heads, num_chunks, shape.head_dim});
            omega_rows = empty(per_chunk);
            params_.omega_rows = data(omega_rows);
            SummaryParams again = params_;
            again.key_mean = data(means);
            again.query_mean = data(means.select(0, 1));
            forward_again(again, stream);
        }
    }
    if (params_.has_projection) {
        params_.projection_pieces = backward.projection_pieces(dtype_, params_);
        const int64_t sizes[] = {params_.projection_pieces, 2, shape.head_dim + 3, shape.head_dim};
        grad_projections = room.empty(sizes, options);
        if (!backward.on_tensor_cores) projection_rows = empty({2, 3, heads, num_chunks, shape.head_dim});
    }

    const auto readable = [&](const Tensor& terms) {
        return backward.on_tensor_cores ? terms : contiguous(terms, accumulation_);
    };
    const Tensor key_terms = readable(grad_landmark_key), value_terms = readable(grad_landmark_value);
    params_.grad_landmark_key = data(key_terms);
    params_.grad_landmark_value = data(value_terms);
    params_.pieces = key_terms.size(1);
    params_.global_columns = key_terms.size(2);
    params_.omega = data(omega_);
    params_.grad_beta = data(grad_beta_);
    params_.grad_key_mean = data(grad_key_mean_);
    params_.grad_query_mean = data(grad_query_mean_);
    params_.chunk_stats = data(chunk_stats_);
    params_.token_weight = data(token_weight_);
    params_.token_grad = data(token_grad_);
    params_.grad_projections = data(grad_projections);
    params_.projection_rows = data(projection_rows);
    params_.grad_mu = data(grad_mu);
    backward.run(dtype_, params_, stream);

    if (!params_.has_projection) return;
    const auto parameter = [](const Tensor& gradient) {
        return ProjectionGradients::Parameter{gradient.numel() ? gradient.data_ptr() : nullptr,
                                              kernel_dtype(gradient.scalar_type())};
    };
    const auto& [key_weight, key_bias, key_norm_weight, key_norm_bias, query_weight, query_bias,
                 query_norm_weight, query_norm_bias] = grad_weights;
    sum_projection_gradients(kernel_dtype(accumulation_),
                             ProjectionGradients{
                                 .terms = data(grad_projections),
                                 .pieces = params_.projection_pieces,
                                 .projections = params_.has_query_projection ? 2 : 1,
                                 .head_dim = shape.head_dim,
                                 .weight = {parameter(key_weight), parameter(query_weight)},
                                 .bias = {parameter(key_bias), parameter(query_bias)},
                                 .norm_weight = {parameter(key_norm_weight), parameter(query_norm_weight)},
                                 .norm_bias = {parameter(key_norm_bias), parameter(query_norm_bias)},
                             },
                             stream);
}

ChunkTerms Summary::chunk_terms(bool for_tensor_cores) {
    if (for_tensor_cores && !rounded_terms_) { // one half of the backward pass is on them, the other is not
        for (Tensor* term : {&omega_, &grad_beta_, &grad_key_mean_, &grad_query_mean_})
            *term = term->to(row_dtype_);
        rounded_terms_ = true;
    }
    return {.rounded = rounded_terms_,
            .omega = data(omega_),
            .grad_beta = data(grad_beta_),
            .grad_key_mean = data(grad_key_mean_),
            .grad_query_mean = data(grad_query_mean_),
            .grad_entropy = params_.grad_entropy,
            .chunk_stats = params_.chunk_stats,
            .token_weight = params_.token_weight,
            .token_grad = params_.token_grad};
}

namespace {

// All are contiguous.
SummaryResults results_in(const Tensors<5>& outputs) {
    const auto& [landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] = outputs;
    return {.landmark_key = data(landmark_key),
            .landmark_value = data(landmark_value),
            .key_mean = data(key_mean),
            .query_mean = data(query_mean),
            .landmark_entropy = data(landmark_entropy)};
}

void forward(const Call& call, const Tensors<5>& outputs) {
    run(ChunkSummary::kName, call, [&](cudaStream_t stream) {
        Summary(call, concrete(call.geometry), results_in(outputs)).forward(stream);
    });
}

void backward(const Call& call, const OptionalTensor& grad_landmark_key,
              const OptionalTensor& grad_landmark_value, const OptionalTensor& grad_landmark_entropy,
              const Tensors<5>& given_outputs, const Tensors<11>& gradients) {
    const auto outputs =
        std::apply([](const auto&... output) { return Tensors<5>(output.contiguous()...); }, given_outputs);
    const auto& [landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] = outputs;
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7] = gradients;
    run(ChunkSummary::kBackwardName, call, [&](cudaStream_t stream) {
        Summary summary(call, concrete(call.geometry), results_in(outputs));
        const SummaryParams& params = summary.params();
        const Shape& shape = params.shape;
        const auto incoming = [&](const OptionalTensor& gradient) {
            const int64_t sizes[] = {shape.batch * shape.heads, 1, shape.geometry.num_chunks(),
                                     shape.head_dim};
            return gradient ? contiguous(gradient, key_mean.scalar_type()).view(sizes)
                            : at::zeros(sizes, key_mean.options());
        };
        const Tensor landmark_key_terms = incoming(grad_landmark_key);
        const Tensor landmark_value_terms = incoming(grad_landmark_value);
        const Tensor entropy_terms =
            grad_landmark_entropy ? grad_landmark_entropy->contiguous() : at::zeros_like(landmark_entropy);
        Room none;
        summary.backward(landmark_key_terms, landmark_value_terms, entropy_terms,
                         {w0, w1, w2, w3, w4, w5, w6, w7}, stream, none);
        simt::chunk_terms(kernel_dtype(call.query.scalar_type()),
                          TermsParams{
                              .shape = shape,
                              .key = params.key,
                              .value = params.value,
                              .key_padding_mask = params.key_padding_mask,
                              .scale = params.scale,
                              .chunk_terms = summary.chunk_terms(/*for_tensor_cores=*/false),
                              .grad_query = rows(grad_query),
                              .grad_key = rows(grad_key),
                              .grad_value = rows(grad_value),
                          },
                          stream);
    });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) { ChunkSummaryBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cuda
