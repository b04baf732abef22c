package peercred

import "strings"

// parseCgroups reads /proc/PID/cgroup (cgroups(7)). path is that of version 2,
// else of systemd's hierarchy, else the first, one below the root before the root
// itself. unit and container are what version 2 and systemd's hierarchy agree on,
// and what all hierarchies agree on; odd says what they do not.
func parseCgroups(text string) (path, unit, container, odd string) {
	rank := 0
	units, containers := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(text) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			continue
		}
		r := 1
		switch {
		case parts[0] == "0" && parts[1] == "":
			r = 3
		case parts[1] == "name=systemd":
			r = 2
		}
		if parts[2] != "/" {
			if r > 1 {
				units[unitOf(parts[2])] = true
			}
			r += 3
		}
		if c := containerOf(parts[2]); c != "" {
			containers[c] = true
		}
		if r > rank {
			path, rank = parts[2], r
		}
	}
	unit, okUnit := only(units)
	container, okContainer := only(containers)
	if !okUnit || !okContainer {
		odd = "the control group hierarchies disagree"
	}
	return path, unit, container, odd
}

// only gives the one member of a set, "" for none or several.
func only(set map[string]bool) (member string, ok bool) {
	if len(set) > 1 {
		return "", false
	}
	for m := range set {
		member = m
	}
	return member, true
}

// unitOf gives the service or scope that a path names, if slices alone lead to it:
// so the system manager lays out its units. Whoever runs a service, or a
// container with a service manager of its own, may name what lies below it as it
// likes, so nothing there counts.
func unitOf(cgroup string) string {
	for seg := range strings.SplitSeq(strings.TrimPrefix(cgroup, "/"), "/") {
		switch {
		case strings.HasSuffix(seg, ".service"), strings.HasSuffix(seg, ".scope"):
			return seg
		case !strings.HasSuffix(seg, ".slice"):
			return ""
		}
	}
	return ""
}

// containerOf gives the outermost container that a path names, in the forms of
// Docker, containerd, CRI-O and Podman under systemd (RUNTIME-ID.scope) and
// without (docker/ID, pod…/ID, libpod_parent/libpod-ID). As for units, only
// groups that a container runtime makes may lead to it. Containers below a service
// (Podman without root, or with --cgroups=split) are not told: the service could
// have made them up.
func containerOf(cgroup string) string {
	inside := false
	for seg := range strings.SplitSeq(strings.TrimPrefix(cgroup, "/"), "/") {
		id, scope := strings.CutSuffix(seg, ".scope")
		for _, runtime := range []string{"docker-", "cri-containerd-", "crio-", "libpod-"} {
			if rest, ok := strings.CutPrefix(id, runtime); ok && (scope || inside) && isContainerID(rest) {
				return rest
			}
		}
		if inside && isContainerID(seg) {
			return seg
		}
		pod := strings.HasPrefix(seg, "pod")
		switch {
		case seg == "docker", seg == "libpod_parent", pod && inside:
			inside = true
		case seg == "kubepods":
			inside = true // pod… may follow at once
		case inside && (seg == "besteffort" || seg == "burstable"):
		case seg == "..": // outside this process's cgroup namespace
		case !strings.HasSuffix(seg, ".slice"):
			return ""
		}
	}
	return ""
}

func isContainerID(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }
