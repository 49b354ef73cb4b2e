//! The bundled image lumen: recipe, builder, store of images.
