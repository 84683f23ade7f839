//! Kernels that are texts in CUDA C++.

use std::{fmt::Debug, hash::Hash};

use cubecl::{
    CubeKernel, PrecompiledSource,
    ir::{
        ElemType, UIntKind,
        metadata::Info,
        settings::{Dim3, KernelSettings},
    },
    prelude::*,
};

/// What tells one text of a file from the others.
pub(crate) trait CudaText: Debug + Copy + Eq + Hash + Send + Sync + 'static {
    /// Name of the function.
    const NAME: &'static str;
    /// Threads of a block.
    const THREADS: u32;

    /// Definitions, and the file below them.
    fn text(&self) -> String;
}

/// A text as CubeCL launches it.
#[derive(Debug)]
pub(crate) struct CudaKernel<T>(pub T);

impl<T: CudaText> KernelMetadata for CudaKernel<T> {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(self.0).cube_dim(Dim3::new_1d(T::THREADS))
    }

    fn address_type(&self) -> ElemType {
        UIntKind::U32.into()
    }
}

impl<T: CudaText> CubeKernel for CudaKernel<T> {
    fn define(&self) -> KernelDefinition {
        let settings =
            KernelSettings::new(Dim3::new_1d(T::THREADS), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), info: Info::default(), settings }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        let (source, entrypoint_name) = (self.0.text(), T::NAME.to_owned());
        Some(PrecompiledSource { source, entrypoint_name, lang: "cuda" })
    }
}
