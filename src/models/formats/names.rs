//! Tensor names by table: a family's prefixes in the place of ours.

/// The prefixes of a family; of several that fit the first counts.
pub(super) struct Names {
    /// Before the number of a block.
    pub(super) layers: &'static str,
    /// Ours and the family's, outside the blocks.
    pub(super) outer: &'static [(&'static str, &'static str)],
    /// Ours and the family's, behind the number of a block.
    pub(super) inner: &'static [(&'static str, &'static str)],
}

/// Before the number of a block, as this crate has it.
const LAYERS: &str = "backbone.layers.";

impl Names {
    /// The family's name of a parameter of ours.
    pub(super) fn upstream(&self, own: &str) -> String {
        replace(own, (LAYERS, self.layers), self.outer.iter().copied(), self.inner.iter().copied())
    }

    /// Our name of a tensor of the family's; a name that is not in the tables stays.
    pub(super) fn own(&self, upstream: &str) -> String {
        let turned = |&(own, upstream): &(&'static str, &'static str)| (upstream, own);
        replace(upstream, (self.layers, LAYERS), self.outer.iter().map(turned), self.inner.iter().map(turned))
    }
}

type Pair = (&'static str, &'static str);

fn replace(
    name: &str,
    layers: Pair,
    mut outer: impl Iterator<Item = Pair>,
    mut inner: impl Iterator<Item = Pair>,
) -> String {
    let swap = |name: &str, (from, to): Pair| name.strip_prefix(from).map(|rest| format!("{to}{rest}"));
    let block = name.strip_prefix(layers.0).and_then(|rest| rest.split_once('.'));
    match block.filter(|(number, _)| number.bytes().all(|digit| digit.is_ascii_digit())) {
        Some((number, rest)) => {
            let rest = inner.find_map(|pair| swap(rest, pair)).unwrap_or_else(|| rest.to_string());
            format!("{}{number}.{rest}", layers.1)
        }
        None => outer.find_map(|pair| swap(name, pair)).unwrap_or_else(|| name.to_string()),
    }
}
