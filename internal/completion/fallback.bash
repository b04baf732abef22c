# Where the package bash-completion is not loaded, these do what is needed of it.
if ! declare -F _get_comp_words_by_ref >/dev/null; then
    # Sets cur, prev, words and cword; "=" and ":" do not end a word.
    _get_comp_words_by_ref()
    {
        local i
        words=() cword=0
        for ((i = 0; i < ${#COMP_WORDS[@]}; i++)); do
            if ((i > 0)) && [[ ${COMP_WORDS[i]} == [=:]* || ${COMP_WORDS[i-1]} == *[=:] ]]; then
                words[${#words[@]}-1]+=${COMP_WORDS[i]}
            else
                words+=("${COMP_WORDS[i]}")
            fi
            ((i == COMP_CWORD)) && cword=$((${#words[@]} - 1))
        done
        cur=${words[cword]} prev=
        ((cword > 0)) && prev=${words[cword-1]}
        return 0
    }
fi
if ! declare -F _filedir >/dev/null; then
    # Folders with -d, else folders and files, of which $1 lists the endings: "yaml|yml|".
    _filedir()
    {
        local name
        compopt -o filenames 2>/dev/null
        while IFS= read -r name; do
            if [[ -d $name || ${1-} != -d && ( -z ${1-} || "|$1" == *"|${name##*.}|"* ) ]]; then
                COMPREPLY+=("$name")
            fi
        done < <(compgen -f -- "$cur")
    }
fi

