# ggml-metal compiles each of its kernel sources by itself, from the library or from a folder beside it: ours comes there as one
# file, with all that it includes by name in the place of each #include.

function(fasa_flatten SOURCE TARGET)
    get_filename_component(SOURCE "${SOURCE}" ABSOLUTE)
    set(SEEN)
    set(TEXT "#include \"${SOURCE}\"\n")

    while (TEXT MATCHES "#include \"([^\"]+)\"\n")
        set(LINE "${CMAKE_MATCH_0}")
        # names are relative to the file that has them; a file that is read begins with its own includes, made absolute
        get_filename_component(FILE "${CMAKE_MATCH_1}" ABSOLUTE)
        set(INNER "")
        if (NOT FILE IN_LIST SEEN)
            list(APPEND SEEN "${FILE}")
            set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${FILE}")
            get_filename_component(FOLDER "${FILE}" DIRECTORY)
            file(READ "${FILE}" INNER)
            string(REPLACE "#pragma once\n" "" INNER "${INNER}")
            string(REGEX REPLACE "#include \"([^\"]+)\"\n" "#include \"${FOLDER}/\\1\"\n" INNER "${INNER}")
        endif()
        string(REPLACE "${LINE}" "@FASA_INCLUDED@" TEXT "${TEXT}")
        string(FIND "${TEXT}" "@FASA_INCLUDED@" AT)
        string(SUBSTRING "${TEXT}" 0 ${AT} BEFORE)
        string(SUBSTRING "${TEXT}" ${AT} -1 AFTER)
        string(REPLACE "@FASA_INCLUDED@" "" AFTER "${AFTER}")
        set(TEXT "${BEFORE}${INNER}${AFTER}")
    endwhile()

    file(CONFIGURE OUTPUT "${TARGET}" CONTENT "${TEXT}" @ONLY)
endfunction()
