package tunnel

import "sync"

// chunkSize is the unit of buffering: one TLS record, and so one frame as we send
// it. An idle stream holds no chunk.
const chunkSize = 16 << 10

type chunk struct {
	r, w int // data[r:w] is unread
	data [chunkSize]byte
}

// chunks is shared by all sessions so that memory follows the traffic and not the
// number of connections.
var chunks = sync.Pool{New: func() any { return new(chunk) }}

func getChunk() *chunk {
	c := chunks.Get().(*chunk)
	c.r, c.w = 0, 0
	return c
}

// buffer is a queue of bytes. One goroutine appends (space, fill, commit), any
// other may read; the session's mutex guards all but the bytes returned by space.
// Whoever appends keeps to a limit: the buffer has none of its own.
type buffer struct {
	queue   []*chunk
	n       int  // unread bytes
	filling bool // the appender writes behind the last chunk's w
	shut    bool // dropped: keeps nothing any more
}

// space returns room for at least one byte behind the last one. Nobody reads it,
// and its chunk stays, until commit.
func (b *buffer) space() []byte {
	b.filling = true
	if k := len(b.queue); k > 0 && b.queue[k-1].w < chunkSize {
		c := b.queue[k-1]
		return c.data[c.w:]
	}
	c := getChunk()
	b.queue = append(b.queue, c)
	return c.data[:]
}

// commit makes the first n bytes of the last space readable.
func (b *buffer) commit(n int) {
	b.filling = false
	b.queue[len(b.queue)-1].w += n
	b.n += n
	switch {
	case b.shut:
		b.drop()
	case b.n == 0:
		b.pop()
	}
}

// read copies out and gives up every chunk that it has emptied.
func (b *buffer) read(p []byte) (n int) {
	for n < len(p) && b.n > 0 {
		c := b.queue[0]
		k := copy(p[n:], c.data[c.r:c.w])
		c.r += k
		n += k
		b.n -= k
		if c.r == c.w && (len(b.queue) > 1 || !b.filling) {
			b.pop()
		}
	}
	return n
}

// drop forgets what is unread and whatever comes later.
func (b *buffer) drop() {
	b.n, b.shut = 0, true
	for len(b.queue) > 1 || len(b.queue) == 1 && !b.filling {
		b.pop()
	}
}

func (b *buffer) pop() {
	chunks.Put(b.queue[0])
	last := len(b.queue) - 1
	copy(b.queue, b.queue[1:])
	b.queue[last] = nil
	b.queue = b.queue[:last]
}
