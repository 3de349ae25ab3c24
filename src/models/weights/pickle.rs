//! The part of Python's pickle that state dicts are made of. Nothing is called and nothing imported.
//!
//! Values live in one list and refer to each other by index: no file can nest them deep enough to overflow a stack or
//! copy them often enough to fill the memory.

/// The index of a value.
pub(super) type Id = usize;

/// A pickled value.
#[derive(Debug)]
pub(super) enum Value {
    Nothing,
    Number(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A Python name, `module.name`.
    Name(String),
    /// A call that is not made: function and arguments.
    Call(Id, Id),
    /// A reference to data outside the pickle.
    Outside(Id),
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads a pickle of protocol 2.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut machine =
            Machine { bytes, at: 0, stack: vec![], marks: vec![], memo: Default::default(), values: vec![] };
        let root = machine.run()?;
        Ok(Self { values: machine.values, root })
    }

    pub(super) fn root(&self) -> &Value {
        self.get(self.root)
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::Nothing)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn name(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Name(name) => Some(name),
            _ => None,
        }
    }

    pub(super) fn number(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(all) => Some(all),
            _ => None,
        }
    }

    /// A tuple of numbers that are not negative.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let size = |&id: &Id| self.number(id).and_then(|n| usize::try_from(n).ok());
        self.tuple(id)?.iter().map(size).collect()
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: std::collections::HashMap<u32, Id>,
    values: Vec<Value>,
}

type Step<T> = Result<T, String>;

impl Machine<'_> {
    fn run(&mut self) -> Step<Id> {
        loop {
            let [code] = self.take()?;
            match code {
                0x80 => drop(self.take::<1>()?),
                b'.' => return self.pop(),
                b'N' => self.push(Value::Nothing),
                b'K' => self.take::<1>().map(|b| self.push(Value::Number(b[0].into())))?,
                b'M' => self.take().map(|b| self.push(Value::Number(u16::from_le_bytes(b).into())))?,
                b'J' => self.take().map(|b| self.push(Value::Number(i32::from_le_bytes(b).into())))?,
                0x88 | 0x89 => self.push(Value::Number((code == 0x88).into())),
                0x8a => {
                    let number = self.long()?;
                    self.push(Value::Number(number));
                }
                // a float: state dicts hold none that matters
                b'G' => self.take::<8>().map(|_| self.push(Value::Nothing))?,
                b'X' => {
                    let size = u32::from_le_bytes(self.take()?) as usize;
                    let text = String::from_utf8_lossy(self.slice(size)?).into_owned();
                    self.push(Value::Text(text));
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.push(Value::Name(name));
                }
                b'(' => self.marks.push(self.stack.len()),
                b')' => self.push(Value::Tuple(vec![])),
                b't' => self.since_mark().map(|all| self.push(Value::Tuple(all)))?,
                0x85..=0x87 => {
                    let mut all = vec![];
                    for _ in 0..code - 0x84 {
                        all.push(self.pop()?);
                    }
                    all.reverse();
                    self.push(Value::Tuple(all));
                }
                b']' => self.push(Value::List(vec![])),
                b'}' => self.push(Value::Dict(vec![])),
                b'a' => {
                    let item = self.pop()?;
                    self.extend_list(&[item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.extend_list(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.extend_dict(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.extend_dict(&items)?;
                }
                b'R' | 0x81 => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let ordered = matches!(self.values.get(function),
                        Some(Value::Name(name)) if name == "collections.OrderedDict");
                    self.push(if ordered { Value::Dict(vec![]) } else { Value::Call(function, arguments) });
                }
                // attributes of an object, such as the metadata of a state dict
                b'b' => drop(self.pop()?),
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Outside(id));
                }
                b'q' => {
                    let [key] = self.take()?;
                    self.remember(key.into())?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.take()?);
                    self.remember(key)?;
                }
                b'h' => {
                    let [key] = self.take()?;
                    self.recall(key.into())?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.take()?);
                    self.recall(key)?;
                }
                other => return Err(format!("pickle opcode {other:#04x} at byte {}", self.at - 1)),
            }
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = if self.stack.len() > floor { self.stack.pop() } else { None };
        top.ok_or_else(|| "a pickle that takes more than it has".into())
    }

    fn since_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("a pickle without its mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn extend_list(&mut self, items: &[Id]) -> Step<()> {
        match self.stack.last().and_then(|&id| self.values.get_mut(id)) {
            Some(Value::List(list)) => list.extend(items),
            _ => return Err("a pickle that appends to something other than a list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Step<()> {
        match self.stack.last().and_then(|&id| self.values.get_mut(id)) {
            Some(Value::Dict(dict)) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("a pickle that sets items of something other than a dict".into()),
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Step<()> {
        let &top = self.stack.last().ok_or("a pickle that remembers nothing")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step<()> {
        let &id = self.memo.get(&key).ok_or("a pickle that recalls what it has not had")?;
        self.stack.push(id);
        Ok(())
    }

    fn long(&mut self) -> Step<i64> {
        let [size] = self.take()?;
        let bytes = self.slice(size.into())?;
        if bytes.len() > 8 {
            return Err("a pickled number of more than 64 bits".into());
        }
        let fill = if bytes.last().is_some_and(|&high| high >= 0x80) { 0xff } else { 0 };
        let mut own = [fill; 8];
        own[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(own))
    }

    fn line(&mut self) -> Step<String> {
        let rest = self.bytes.get(self.at..).unwrap_or(&[]);
        let end = rest.iter().position(|&b| b == b'\n').ok_or("a truncated pickle")?;
        self.at += end + 1;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }

    fn slice(&mut self, size: usize) -> Step<&[u8]> {
        let end = self.at.checked_add(size).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("a truncated pickle")?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn take<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut own = [0; N];
        own.copy_from_slice(self.slice(N)?);
        Ok(own)
    }
}
