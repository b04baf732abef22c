package pemfile

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// Names in the folder.
const (
	FileChain    = "svid.pem"
	FileKey      = "svid_key.pem"
	fileCombined = "combined.pem"
	FileBundle   = "bundle.pem"

	link      = "..data"     // → the present version's folder
	linkNext  = "..data.new" // becomes link
	versions  = "..v"        // prefix of versions' folders
	nameNext  = ".new"       // suffix of a name that becomes another
	bundlePre = "bundle."    // prefix of a federated bundle
)

// content is a file of a version.
type content struct {
	data []byte
	mode fs.FileMode
}

// Write makes svid and bundles the present version and keeps the one before. On an
// error the present version is still the one before.
func (w *Writer) Write(svid *x509svid.SVID, bundles identity.Bundles) error {
	files, err := w.render(svid, bundles)
	if err != nil {
		return err
	}
	last, err := w.present()
	if err != nil {
		return err
	}
	if err := w.clean(last); err != nil {
		return fmt.Errorf("removing old versions: %w", err)
	}
	// A name of its own, also after the clock was set back.
	w.serial++
	name := fmt.Sprintf("%s%d.%d.%d", versions, time.Now().UnixNano(), os.Getpid(), w.serial)
	if err := w.writeVersion(name, files); err != nil {
		return fmt.Errorf("writing a version: %w", err)
	}
	if err := w.point(link, linkNext, name); err != nil {
		return fmt.Errorf("exchanging the version: %w", err)
	}
	if err := w.names(files); err != nil {
		return fmt.Errorf("naming the files: %w", err)
	}
	return nil
}

func (w *Writer) render(svid *x509svid.SVID, bundles identity.Bundles) (map[string]content, error) {
	chain, key, err := svid.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encoding the SVID: %w", err)
	}
	own := bundles[svid.ID.TrustDomain()]
	if own == nil || len(own.X509Authorities()) == 0 {
		return nil, fmt.Errorf("no bundle of trust domain %s", svid.ID.TrustDomain())
	}
	files := map[string]content{
		FileChain:    {chain, publicMode},
		FileKey:      {key, w.mode},
		fileCombined: {slices.Concat(key, chain), w.mode},
		FileBundle:   {encode(own.X509Authorities()), publicMode},
	}
	for name, data := range w.extra {
		b, err := data(svid)
		if err != nil {
			return nil, fmt.Errorf("making %s: %w", name, err)
		}
		files[name] = content{b, publicMode}
	}
	for td, b := range bundles {
		if w.cfg.Federated && td != svid.ID.TrustDomain() && len(b.X509Authorities()) > 0 {
			files[bundlePre+td.Name()+".pem"] = content{encode(b.X509Authorities()), publicMode}
		}
	}
	return files, nil
}

func encode(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer takes all
	}
	return b.Bytes()
}

// present returns the folder of the present version; "": there is none.
func (w *Writer) present() (string, error) {
	name, err := w.root.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("finding the present version: %w", err)
	}
	if !strings.HasPrefix(name, versions) || strings.Contains(name, "/") {
		return "", fmt.Errorf("finding the present version: %s leads to %q, which is not ours", link, name)
	}
	return name, nil
}

// clean removes what is neither the present version nor a name: versions before
// it, and what a crash left half-way.
func (w *Writer) clean(present string) error {
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		leftover := strings.HasPrefix(name, versions) && name != present || strings.HasSuffix(name, nameNext)
		if !leftover {
			continue
		}
		if err := w.before("remove " + name); err != nil {
			return err
		}
		if err := w.root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

func (w *Writer) writeVersion(name string, files map[string]content) error {
	if err := w.before("mkdir"); err != nil {
		return err
	}
	if err := w.root.Mkdir(name, 0o700); err != nil {
		return err
	}
	for _, n := range slices.Sorted(maps.Keys(files)) {
		if err := w.before("write " + n); err != nil {
			return err
		}
		if err := w.writeFile(path.Join(name, n), files[n]); err != nil {
			return err
		}
	}
	if err := w.before("open the version"); err != nil {
		return err
	}
	return w.root.Chmod(name, folderMode)
}

// writeFile gives the file away and opens it to others only when it is complete.
func (w *Writer) writeFile(name string, c content) error {
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(c.data)
	if err == nil && (w.uid >= 0 || w.gid >= 0) {
		err = f.Chown(w.uid, w.gid)
	}
	if err == nil {
		err = f.Chmod(c.mode) // whatever the umask
	}
	if err == nil && w.cfg.AllowDisk {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// point makes name a symbolic link to target by one rename.
func (w *Writer) point(name, next, target string) error {
	if err := w.before("link " + next); err != nil {
		return err
	}
	if err := w.root.Symlink(target, next); err != nil {
		return err
	}
	if err := w.before("rename to " + name); err != nil {
		return err
	}
	return w.root.Rename(next, name)
}

// inOrder gives the names with those of [Writer.Add] last: they may speak of the
// others, which are there once these are.
func (w *Writer) inOrder(files map[string]content) []string {
	return slices.SortedFunc(maps.Keys(files), func(a, b string) int {
		_, addedA := w.extra[a]
		_, addedB := w.extra[b]
		switch {
		case addedA == addedB:
			return strings.Compare(a, b)
		case addedA:
			return 1
		}
		return -1
	})
}

// names makes the names that programs open, and removes those of bundles that are
// gone.
func (w *Writer) names(files map[string]content) error {
	for _, n := range w.inOrder(files) {
		target := path.Join(link, n)
		if got, err := w.root.Readlink(n); err == nil && got == target {
			continue
		}
		if err := w.point(n, n+nameNext, target); err != nil {
			return err
		}
	}
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range entries {
		if _, have := files[n]; !have && strings.HasPrefix(n, bundlePre) && strings.HasSuffix(n, ".pem") {
			if err := w.root.Remove(n); err != nil {
				return err
			}
		}
	}
	return nil
}
