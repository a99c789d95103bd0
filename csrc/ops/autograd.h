#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <array>
#include <string>
#include <torch/csrc/autograd/custom_function.h>
#include <vector>

#include "ops/signature.h"

namespace eva_attn {
namespace detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class T>
using Owned =
    std::conditional_t<std::is_same_v<T, c10::SymIntArrayRef>, std::vector<c10::SymInt>, std::decay_t<T>>;
template <class T>
constexpr bool kIsTensor = std::is_same_v<Owned<T>, Tensor> || std::is_same_v<Owned<T>, OptionalTensor>;

template <class T>
Owned<T> from_tensor(const Tensor& tensor) {
    if constexpr (std::is_same_v<Owned<T>, OptionalTensor>) {
        return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    } else {
        return tensor;
    }
}

// Arguments of a forward: tensors as saved variables, the rest as saved data.
struct Writer {
    AutogradContext* context;
    variable_list tensors;
    size_t num_values = 0;

    void operator()(const Tensor& tensor) { tensors.push_back(tensor); }
    void operator()(const OptionalTensor& tensor) { tensors.push_back(tensor.value_or(Tensor())); }
    void operator()(c10::SymIntArrayRef sizes) { write(sizes.vec()); }
    template <class T>
    void operator()(const T& value) {
        write(value);
    }

  private:
    template <class T>
    void write(const T& value) {
        context->saved_data[std::to_string(num_values++)] = c10::IValue(value);
    }
};

struct Reader {
    AutogradContext* context;
    variable_list tensors;
    size_t num_tensors = 0, num_values = 0;

    template <class T>
    Owned<T> next() {
        if constexpr (kIsTensor<T>) {
            return from_tensor<T>(tensors[num_tensors++]);
        } else {
            const c10::IValue& value = context->saved_data[std::to_string(num_values++)];
            if constexpr (std::is_same_v<Owned<T>, std::vector<c10::SymInt>>) {
                return value.toSymIntVector();
            } else if constexpr (std::is_same_v<Owned<T>, c10::SymInt>) {
                return value.toSymInt();
            } else {
                return value.to<Owned<T>>();
            }
        }
    }
};

// One gradient for each argument of the forward.
template <class Op, size_t kNumGradients>
struct GradientList {
    const std::array<Tensor, kNumGradients>& gradients;
    variable_list list;
    size_t num_tensors = 0, num_gradients = 0;

    void operator()(const Tensor& tensor) {
        const Tensor gradient = Op::has_gradient(num_tensors++) ? gradients[num_gradients++] : Tensor();
        list.push_back(tensor.defined() ? gradient : Tensor());
    }
    void operator()(const OptionalTensor& tensor) { (*this)(tensor.value_or(Tensor())); }
    template <class T>
    void operator()(const T&) {
        list.emplace_back();
    }
};

template <class Tuple>
auto to_array(Tuple&& tuple) {
    return std::apply([](auto&&... t) { return std::array<Tensor, sizeof...(t)>{t...}; }, tuple);
}

template <class Op, class Inputs, class Options>
struct Formula;

// An `Op` also has kDifferentiable, which of its outputs carry a gradient, and has_gradient(i): whether
// tensor argument i gets one; the backward op returns them in this order.
template <class Op, class... Inputs, class... Options>
struct Formula<Op, Types<Inputs...>, Types<Options...>> {
    // Outputs without a gradient leave through the pointer.
    static variable_list forward(AutogradContext* context, Tensors<Op::kNumOutputs>* outputs,
                                 Inputs... inputs, Options... options) {
        const at::AutoDispatchBelowADInplaceOrView below;
        *outputs = forward_op<Op>().call(inputs..., options...);
        const auto all = to_array(*outputs);

        context->set_materialize_grads(false);
        Writer writer{context, {}};
        (writer(inputs), ...);
        (writer(options), ...);
        writer.tensors.insert(writer.tensors.end(), all.begin(), all.end());
        context->save_for_backward(std::move(writer.tensors));
        variable_list differentiable;
        for (const size_t i : Op::kDifferentiable) differentiable.push_back(all[i]);
        return differentiable;
    }

    static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
        Reader reader{context, context->get_saved_variables()};
        const std::tuple<Owned<Inputs>...> inputs{reader.template next<Inputs>()...};
        const std::tuple<Owned<Options>...> options{reader.template next<Options>()...};

        std::array<Tensor, Op::kNumGradients> gradients;
        bool any = false;
        for (const Tensor& gradient : grad_outputs) any |= gradient.defined();
        if (any) {
            Tensors<Op::kNumOutputs> outputs;
            std::apply([&](auto&... output) { ((output = reader.template next<const Tensor&>()), ...); },
                       outputs);
            gradients = to_array(
                std::apply([](const auto&... argument) { return backward_op<Op>().call(argument...); },
                           std::tuple_cat(owned_gradients(typename Op::GradOutputs(), grad_outputs), inputs,
                                          outputs, options)));
        }
        GradientList<Op, Op::kNumGradients> list{gradients, variable_list(1)}; // the pointer's comes first
        std::apply([&](const auto&... argument) { (list(argument), ...); }, std::tuple_cat(inputs, options));
        return std::move(list.list);
    }

    template <class... T>
    static std::tuple<Owned<T>...> owned_gradients(Types<T...>, const variable_list& gradients) {
        Reader reader{nullptr, gradients};
        return std::tuple<Owned<T>...>{reader.template next<T>()...};
    }
};

// What profilers and `grad_fn` show: a name without the types of the options.
template <class Op>
struct Node : Formula<Op, typename Op::Inputs, typename Op::Options>, torch::autograd::Function<Node<Op>> {
    static constexpr bool is_traceable = true;
};

// Whether a forward has to be recorded; where not, a Node would cost several times the dispatch.
inline bool is_recorded(const Tensor& tensor) {
    return tensor.defined() &&
           ((at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined());
}
inline bool is_recorded(const OptionalTensor& tensor) { return tensor && is_recorded(*tensor); }
template <class T>
bool is_recorded(const T&) {
    return false;
}

template <class Op, class Signature>
struct BackwardFormula;

template <class Op, class Results, class... Arguments>
struct BackwardFormula<Op, Results(Arguments...)> {
    static variable_list forward(AutogradContext*, Arguments... arguments) {
        const at::AutoDispatchBelowADInplaceOrView below;
        const auto gradients = to_array(backward_op<Op>().call(arguments...));
        return variable_list(gradients.begin(), gradients.end());
    }

    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK_NOT_IMPLEMENTED(false, Op::kName,
                                    " has no second derivative: it supports first-order gradients only");
    }
};

template <class Op>
struct BackwardNode : BackwardFormula<Op, BackwardSignature<Op>>,
                      torch::autograd::Function<BackwardNode<Op>> {
    static constexpr bool is_traceable = true;
};

} // namespace detail

template <class Op, class Inputs = typename Op::Inputs, class Options = typename Op::Options>
struct AutogradForward;
template <class Op, class... Inputs, class... Options>
struct AutogradForward<Op, Types<Inputs...>, Types<Options...>> {
    static Tensors<Op::kNumOutputs> call(Inputs... inputs, Options... options) {
        if (!(detail::is_recorded(inputs) || ...) && !(detail::is_recorded(options) || ...)) {
            const at::AutoDispatchBelowADInplaceOrView below;
            return forward_op<Op>().call(inputs..., options...);
        }
        using Node = detail::Node<Op>;
        Tensors<Op::kNumOutputs> outputs;
        const auto differentiable = Node::apply(&outputs, inputs..., options...);
        [&]<size_t... i>(std::index_sequence<i...>) {
            ((std::get<Op::kDifferentiable[i]>(outputs) = differentiable[i]), ...);
        }(std::make_index_sequence<Op::kDifferentiable.size()>());
        return outputs;
    }
};

template <class Op, class Signature = BackwardSignature<Op>>
struct AutogradBackward;
template <class Op, class Results, class... Arguments>
struct AutogradBackward<Op, Results(Arguments...)> {
    static Results call(Arguments... arguments) {
        const auto list = detail::BackwardNode<Op>::apply(arguments...);
        Results results;
        size_t i = 0;
        std::apply([&](auto&... result) { ((result = list[i++]), ...); }, results);
        return results;
    }
};

} // namespace eva_attn
