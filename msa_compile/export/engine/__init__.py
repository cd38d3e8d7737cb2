"""TensorRT engines of a sparse program: selection and attention are plugins, the rest are TensorRT's own layers."""
