// Runs a model that export_vit.py packaged, and calls an operator by itself, without Python:
//
//     run_vit OPERATORS MODEL.pt2 IMAGES.pt LOGITS.pt
//
// OPERATORS is the library that eva_attn.build_info()["library"] names; IMAGES.pt holds a tensor that
// torch.save wrote, and LOGITS.pt gets one for torch.load.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <dlfcn.h>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

using at::Tensor;

// Loading the library registers its operators.
void load_operators(const char* library) {
    if (!dlopen(library, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

// The operator of tensors [B, H, N, D] as sequences, with the defaults of all options that are not named.
Tensor eva_attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t window_size,
                     int64_t chunk_size) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("eva_attn::eva_attention", "");
    torch::jit::Stack stack{query, key, value};
    op.schema().checkAndNormalizeInputs(stack, {{"grid_size", std::vector<int64_t>{1, query.size(2)}},
                                                {"window_size", std::vector<int64_t>{1, window_size}},
                                                {"chunk_size", std::vector<int64_t>{1, chunk_size}},
                                                {"exclude_window_landmarks", true}});
    op.callBoxed(stack);
    return stack.front().toTensor();
}

// How far the operator and its gradient are from softmax attention where one window covers the sequence, and
// the two are the same.
double distance_from_softmax() {
    const auto draw = [] { return at::randn({2, 3, 16, 8}, at::kDouble).requires_grad_(); };
    const Tensor query = draw(), key = draw(), value = draw();
    const auto gradient = [&](const Tensor& output) {
        query.mutable_grad() = Tensor();
        output.square().sum().backward();
        return query.grad();
    };
    const Tensor actual = eva_attention(query, key, value, /*window_size=*/16, /*chunk_size=*/4);
    const Tensor expected = at::scaled_dot_product_attention(query, key, value);
    const Tensor gradients = gradient(actual) - gradient(expected);
    return std::max((actual - expected).abs().max().item<double>(), gradients.abs().max().item<double>());
}

Tensor load_tensor(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(std::string("cannot read ") + path);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    return torch::jit::pickle_load(bytes).toTensor();
}

void save_tensor(const Tensor& tensor, const char* path) {
    const std::vector<char> bytes = torch::jit::pickle_save(tensor);
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

} // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::cerr << "usage: " << argv[0] << " OPERATORS MODEL.pt2 IMAGES.pt LOGITS.pt\n";
        return 2;
    }
    load_operators(argv[1]);
    std::cout << "largest difference from softmax where the two are the same: " << distance_from_softmax()
              << "\n";

    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const Tensor logits = model.run({load_tensor(argv[3])}).front();
    save_tensor(logits, argv[4]);
    std::cout << "logits of " << logits.size(0) << " images in " << argv[4] << "\n";
}
