package revocation

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
)

// keptFile holds the newest list over a restart, 0600.
const keptFile = "revocations.pb"

// Keeper saves a book's newest list in a state folder, apart from whoever brings
// one: what a list refuses is cut without waiting for a disk.
type Keeper struct {
	dir  string
	log  hclog.Logger
	news chan []byte // cap 1: an envelope to save
}

// NewKeeper makes the keeper of a folder, which it makes if missing when it saves.
func NewKeeper(dir string, log hclog.Logger) *Keeper {
	return &Keeper{dir: dir, log: log, news: make(chan []byte, 1)}
}

// Restore puts the saved list in force. One that is missing or cannot be believed is
// left out, the latter with a warning.
func (k *Keeper) Restore(b *Book) {
	envelope, err := readList(k.dir)
	if err == nil {
		_, err = b.Restore(envelope)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.log.Warn("the saved revocation list is not used", "error", err)
	}
}

// Note has an envelope saved soon. Of several only the newest is. Calls must follow
// one another.
func (k *Keeper) Note(envelope []byte) {
	select {
	case <-k.news:
	default:
	}
	k.news <- envelope
}

// Run saves until ctx ends, and what is noted by then.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		select {
		case envelope := <-k.news:
			k.save(envelope)
		case <-ctx.Done():
			select {
			case envelope := <-k.news:
				k.save(envelope)
			default:
			}
			return nil
		}
	}
}

func (k *Keeper) save(envelope []byte) {
	if err := writeList(k.dir, envelope); err != nil {
		k.log.Warn("the revocation list was not saved; after a restart it is fetched anew", "error", err)
	}
}

func readList(dir string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, keptFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxEnvelope+1)) // more is refused when it is opened
}

// writeList replaces the file, so that it is the old or the new one at any time.
func writeList(dir string, envelope []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, keptFile+".*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(envelope)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, keptFile))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
