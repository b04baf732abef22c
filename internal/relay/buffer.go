package relay

import "sync"

// Buffers grow with the stream: an idle connection holds the smallest, bulk data
// moves in the largest. Sizes in bytes; a TLS record carries at most 16 KiB.
const (
	smallSize  = 2 << 10
	mediumSize = 16 << 10
	largeSize  = 64 << 10
)

// pools holds idle buffers by level; shared by all pipes, as the garbage
// collector is.
var pools = [...]sync.Pool{
	{New: func() any { return newBuffer(smallSize) }},
	{New: func() any { return newBuffer(mediumSize) }},
	{New: func() any { return newBuffer(largeSize) }},
}

func newBuffer(size int) *[]byte {
	b := make([]byte, size)
	return &b
}

// buffer is a pooled byte slice. Whoever took it gives it back.
type buffer struct {
	level int
	data  *[]byte
}

func take(level int) buffer {
	return buffer{level, pools[level].Get().(*[]byte)}
}

func (b buffer) give() { pools[b.level].Put(b.data) }

// fit returns the buffer for the next read after one of n bytes: larger when b
// was filled, smaller when n would not have filled half of the smaller one.
func (b buffer) fit(n int) buffer {
	level := b.level
	if n == len(*b.data) && level < len(pools)-1 {
		level++
	}
	for level > 0 && n <= sizeOf(level-1)/2 {
		level--
	}
	if level == b.level {
		return b
	}
	b.give()
	return take(level)
}

func sizeOf(level int) int {
	return [...]int{smallSize, mediumSize, largeSize}[level]
}
