package proxy

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

const appDialLimit = 5 * time.Second

// App is where the app serves one declared port.
type App struct {
	Port    string // declared name
	Network string // "tcp" or "unix"
	Address string
}

// dial connects to the app.
func (in *Inbound) dial(ctx context.Context, port string) (net.Conn, error) {
	if in.draining.Load() {
		return nil, errDrained
	}
	app, ok := in.served[port]
	if !ok {
		return nil, fmt.Errorf("port %s is not served by this instance", port)
	}
	conn, err := dialer(appDialLimit).DialContext(ctx, app.Network, app.Address)
	if ctx.Err() == nil { // else it says nothing about the app
		in.apps.note(port, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reaching the app: %w", err)
	}
	return conn, nil
}

func dialer(limit time.Duration) *net.Dialer {
	d := &net.Dialer{Timeout: limit}
	d.SetMultipathTCP(false) // kernel sandboxes see plain TCP only
	return d
}

// appStates is how the last dial of each port went. The zero value is ready.
type appStates struct {
	mu   sync.Mutex
	errs map[string]error // guarded by mu; :: port name → why its last dial failed
}

func (a *appStates) note(port string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		delete(a.errs, port)
		return
	}
	if a.errs == nil {
		a.errs = make(map[string]error)
	}
	a.errs[port] = err
}

func (a *appStates) errors() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for port, err := range a.errs {
		out = append(out, fmt.Sprintf("port %s: %v", port, err))
	}
	slices.Sort(out)
	return out
}
