#include "ops/decode_step.h"

#include <cmath>
#include <limits>

#include "cuda/support.h"

namespace eva_attn::cuda {
namespace {

void forward(const DecodeCall& decode, const Tensor& output) {
    const auto& [call, state, num_tokens, log_count_bias] = decode;
    const Tensor& query = call.query;
    const auto size = [](const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); };
    const int64_t num_landmarks = state.landmark_key.size(2), chunk_size = size(call.geometry.chunk_width);
    check_head_dim(query);
    TORCH_CHECK_VALUE(state.window_key.size(2) + num_landmarks <= std::numeric_limits<int32_t>::max() / 2,
                      "window_key and landmark_key must have fewer than 2^30 rows on CUDA, got shapes ",
                      state.window_key.sizes(), " and ", state.landmark_key.sizes());
    TORCH_CHECK_VALUE(num_landmarks * chunk_size <= std::numeric_limits<int32_t>::max(),
                      "landmark_key must have room for fewer than 2^31 tokens on CUDA, got shape ",
                      state.landmark_key.sizes(), " with chunk_size ", chunk_size);

    const ProjectionTensors key_projection =
        projection_tensors(call.summary.key, state.key_sum.scalar_type());
    const ProjectionTensors query_projection =
        projection_tensors(call.summary.query, state.key_sum.scalar_type());
    const Tensor counts = contiguous(num_tokens, at::kLong);
    const Tensor bias = call.attention.relative_bias ? call.attention.relative_bias->contiguous() : Tensor();
    const DType dtype = kernel_dtype(query.scalar_type());
    const DecodeParams params{
        .batch = query.size(0),
        .heads = query.size(1),
        .tokens = query.size(2),
        .head_dim = query.size(3),
        .window_size = size(call.geometry.window_width),
        .overlap = size(call.geometry.overlap_x),
        .chunk_size = chunk_size,
        .num_landmarks = num_landmarks,
        .query = rows(query),
        .key = rows(call.key),
        .value = rows(call.value),
        .num_tokens = static_cast<const int64_t*>(data(counts)),
        .window_key = data(state.window_key),
        .window_value = data(state.window_value),
        .landmark_key = data(state.landmark_key),
        .landmark_value = data(state.landmark_value),
        .key_sum = data(state.key_sum),
        .query_sum = data(state.query_sum),
        .position = state.head_position.mutable_data_ptr<int64_t>(),
        .key_projection = projection(key_projection),
        .query_projection = projection(query_projection),
        .has_projection = call.summary.key.weight.has_value(),
        .has_query_projection = call.summary.query.weight.has_value(),
        .norm_eps = call.summary.norm_eps,
        .scale = scale_of(call),
        .relative_bias_dtype = bias.defined() ? kernel_dtype(bias.scalar_type()) : dtype,
        .relative_bias = data(bias),
        .relative_bias_head_stride = bias.defined() && bias.size(0) > 1 ? bias.stride(0) : 0,
        .landmark_bias = log_count_bias ? std::log(static_cast<double>(chunk_size)) : 0,
        .landmark_entropy = state.landmark_entropy ? data(*state.landmark_entropy) : nullptr,
        .exclude_window_landmarks = call.attention.exclude_window_landmarks,
        .output = rows(output),
    };
    run("eva_attn::decode_step", call,
        [&](cudaStream_t stream) { simt::decode_step(dtype, params, stream); });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) { m.impl("decode_step", &DecodeStepBackend<forward>::forward); }

} // namespace eva_attn::cuda
